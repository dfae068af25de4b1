"""Several processes as one: process group, rendezvous, DDP, watchdog, stop requests, the launcher's contract."""
