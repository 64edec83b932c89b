if __name__ != "proteus_deploy.benchmarks":
    raise ImportError("import proteus_deploy.benchmarks; the bare name 'benchmarks' is not this project's")
