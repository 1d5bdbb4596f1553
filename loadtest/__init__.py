"""Load tests of PushUp and its peers. Raw results are kept in results/; REPORT.md is made from them alone."""
