"""Whether a run fits and what it takes, by arithmetic alone: neither weights nor data are read."""
