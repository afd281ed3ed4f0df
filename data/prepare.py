"""Any files -> prepared data: `python -m data.prepare FILES ... --out=DIR`; data/pipeline.py does the work."""

from data.pipeline import command

if __name__ == "__main__":
    command()
