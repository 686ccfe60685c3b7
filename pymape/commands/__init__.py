"""What the `pymape` command runs, one module a command, and the page that each leaves."""
