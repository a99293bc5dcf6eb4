"""What would waste a night, found in a minute: facts are gathered on every rank, and judged on rank 0.

facts, network    what one rank finds out alone
meeting           all ranks together: who is missing, clocks, the run directory
exchange          all ranks together: is an all-reduce right, and how fast
checks            from everybody's facts to findings: pure functions
"""
