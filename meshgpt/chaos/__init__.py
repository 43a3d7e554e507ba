"""`meshgpt chaos`: a pod of processes on this machine is disturbed in every way that is at hand, and the run it trains
must end as an undisturbed one does.

`faults` plans and does them, `disk` is one that can be full, `worker` is the trainer that keeps a record of what it was
fed, `proof` compares the ends.
"""
