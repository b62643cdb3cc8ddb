from pathlib import Path


def write(folder, cells, results):
    return []
