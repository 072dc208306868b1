"""The benchmark: this server and what people use instead, measured side by side, in one run, on one machine.

`make bench` runs all of it, `make bench-quick` only this server, `make bench-peers` installs the others. Each system is driven
through its own front door by a process of its own (`bench/drivers/`), with the same checkpoint, token ids, adapters and precision.
Repetitions take turns, so that whatever the machine does meanwhile happens to all of them. Nothing here is imported by the server.
"""
