"""The proof of architectures: every one is trained, converted, loaded in plain PEFT, and served by the real engine.

models       the table of tiny models
adapters     a base on disk, one adapter of each method, and PEFT's answers with them
engine       the same adapters in the engine of `astra-serve`
row          one row of the result, made by these two
table        the result as JSON (`results.json`) and as the table in trainer/README.md
__main__     `make model-test`: all rows, on all cores, compared with `results.json`
"""
