"""Uses of the public API that mypy checks with the code (`make lint`), in strict mode.

`accepted_*.py` is what a third party writes: mypy must accept it. In `rejected.py` each line with a mistake carries
`# type: ignore[CODE]`: if mypy accepts the mistake, it reports the comment as unused.
"""
