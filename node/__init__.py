"""The process, `python -m node`.  Read `node/main.py` first."""

from node.runtime.interrupts import end_at_once_on_interrupt, is_command

if is_command("node"):
    end_at_once_on_interrupt()
