"""Command `python -m roll_gspo.evaluate`. Its code is in `roll_gspo.evaluation`: `roll_gspo.evaluate` is a function."""

from roll_gspo.evaluation import main

if __name__ == "__main__":
    main()
