# To be sourced: require_folders NAME ... makes the folders that these variables name absolute, or says which is none.
require_folders() {
    local name
    for name in "$@"; do
        if [ ! -d "${!name:-}" ]; then
            echo "error: $name=${!name:-} is not a folder; $0 says what it must hold" >&2
            exit 2
        fi
        export "$name=$(cd "${!name}" && pwd)"
    done
}
