def run_demo(*a): pass
