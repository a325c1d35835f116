"""The subcommands, a file each that is called like it (cli.py); and what they use.

parsing.py, mistakes.py               how a command line is read, and what is said of one that cannot be
fit_checks.py, fit_resume.py          what fit refuses, and which checkpoint it goes on from
bench_inference.py, bench_reading.py  the kinds of bench beside training
stand_in_fit.py, same_numbers.py      what estimate and gpu_check run without weights and data, and on two devices
"""
