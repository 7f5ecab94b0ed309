"""A page that shows what a command measured: self-contained HTML, and its plots as files."""
