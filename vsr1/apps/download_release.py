"""Download the small parts of the authors' release, and show how far one search gets by its vectors."""

from vsr1 import config
from vsr1.data import annotations, official_release, real_datasets
from vsr1.evaluation import metrics
from vsr1.experiments import retrieval
from vsr1.models.search_index import Vectors
from vsr1.report import results


def main(profile, dataset: str, source: str | None = None) -> None:
    """Download what is missing here, and print what the release lacks and how far its vectors get."""
    absent = official_release.download(profile, dataset, source)
    if absent:
        print(f"not in the release: {', '.join(absent)}")
    files = official_release.vector_files("test")
    if all((config.ROOT / profile.data / dataset / name).exists() for name in files):
        print(first_search(profile, dataset))


def first_search(profile, dataset: str) -> str:
    """Say how often the first search by the released vectors finds the video, beside the paper's numbers."""
    queries = annotations.read_fig(real_datasets.annotation_files(profile, dataset)[1])
    vectors = Vectors(*official_release.read_vectors(profile, dataset))
    ranks, paper = retrieval.first_search(queries, vectors).ranks, results.published()
    recalls = [
        f"R@{k} {metrics.recall_at(ranks, k):.1f} ({paper[f'T1/{dataset}/zs/vr@{k}']})" for k in profile.vr_ks
    ]
    return f"first search by the released vectors, {len(queries)} queries (paper): {', '.join(recalls)}"
