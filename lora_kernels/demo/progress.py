"""A progress bar where tqdm is installed, and nothing where it is not."""


def bar(iterable, label):
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=f"{label:<22}", leave=False, dynamic_ncols=True)
