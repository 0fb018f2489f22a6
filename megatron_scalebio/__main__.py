import sys

from megatron_scalebio.cli import main

sys.exit(main())
