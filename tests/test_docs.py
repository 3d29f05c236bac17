"""The pages for visitors: their links, names and commands exist, their generated parts are current."""

import importlib.util
import itertools
import json
import re
import statistics
import xml.etree.ElementTree
from pathlib import Path

from runtime.config import reference
from runtime.run_folder import FREE_KEYS

import pytest
import yaml

from benchmarks import real_model_report

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "configs" / "README.md",
    ROOT / "tests" / "faults" / "FAULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
OF_RUNS = {".venv", "quickstart_out", "outputs", "data"}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - OF_RUNS
SCRIPTS = [
    path
    for pattern in ("*.py", "*.sh")
    for path in ROOT.rglob(pattern)
    if path.relative_to(ROOT).parts[0] not in OF_RUNS
]
OF_THE_PREDECESSOR = {"eval/harness.py"}  # docs/migration.md says what replaces it
FLAGS_OF_SLURM = {"--account", "--gpus-per-node", "--nodes", "--partition", "--time"}
FLAGS_OF_OTHERS = FLAGS_OF_SLURM | {"--check", "--gen_kwargs", "--help", "--no-deps", "--num_gpus"}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def load_build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued lines joined; and commands in backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    lines += re.findall(r"`((?:python|bash|deepspeed) [^`]+)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_the_front_page_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 15_000


def test_the_front_page_links_every_page():
    links = set(re.findall(r"\]\(([^)#]+)", read("README.md")))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert pages <= links


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    script_names = {path.name for path in SCRIPTS}
    named = set(re.findall(r"`([\w./-]+)`", page.read_text()))
    for name in named - OF_THE_PREDECESSOR:
        if "/" in name and name.split("/")[0] in FOLDERS:
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"[\w.-]+\.(py|sh)", name):
            assert name in script_names, name


@every_page
def test_tests_that_are_named_exist(page):
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= defined


@every_page
def test_commands_that_are_shown_can_be_typed(page):
    """Their scripts, configs, flags and config keys exist."""
    code = "\n".join(path.read_text() for path in SCRIPTS)
    known_flags = FLAGS_OF_OTHERS.union(re.findall(r"--[a-z][\w-]*", code))
    known_keys = set(re.findall(r"^\| `([\w.]+)`", reference(), re.MULTILINE))
    for command in commands(page):
        files = re.findall(r"[\w./-]+\.(?:py|sh)\b", command)
        files += re.findall(r"\bconfigs/[\w./-]+\.yaml", command)
        flags = set(re.findall(r"(?<=\s)--[a-z][\w-]*", command))
        keys = set(re.findall(r"\b((?:train|data|student_model|teacher_model)\.\w+)=", command))
        assert not [file for file in files if not (ROOT / file).is_file()], command
        assert not flags - known_flags, command
        assert not keys - known_keys, command


@pytest.mark.parametrize("page", build.GENERATED)
def test_generated_parts_are_current(page):
    """If not: python docs/build.py."""
    assert build.with_generated(page) == read(f"docs/{page}")


def test_the_decoding_table_is_that_of_the_stored_points():
    page = read("docs/generation.md")
    for point in build.DECODE["points"]:
        cells = [
            str(point["batch_size"]),
            f"{point['context']:,}",
            f"{point['teacher_tokens_per_s']:,}",
            f"{point['hybrid_tokens_per_s']:,}",
            f"{point['speed_up']:.2f}",
            f"{point['bytes_ratio']:.2f}",
            f"{point['teacher_cache_mib']:,} MiB",
            f"{point['hybrid_cache_mib']:,} MiB",
            f"{point['cache_share']:.0%}",
        ]
        assert f"| {' | '.join(cells)} |" in page


def regrets_of(method: str, name: str = "regret") -> list[dict]:
    return [choice for choice in build.REGRETS[name]["choices"] if choice["method"] == method]


def test_what_the_text_says_of_the_best_sets_is_in_the_stored_figures():
    cases = build.REGRETS["regret"]["cases"]
    assert len(cases) == 8 and {case["best"] for case in cases} == {"[0, 1]", "[0, 1, 2]"}
    for method in ("gates", "gates:mixture", "rounds", "rounds:mixture", "ppl", "ar", "ar_multihop"):
        assert [choice["regret"] for choice in regrets_of(method)] == [1] * 8
    assert [choice["keep"] for choice in regrets_of("scan") if choice["regret"] > 1] == [[0, 1, 7]] * 2
    pairs: dict[int, list[float]] = {0: [], 1: []}  # those with one of the first two layers: regrets
    for case in cases:
        best = case["sets"][case["best"]]["kl"]
        for first, second in itertools.product(pairs, range(2, 8)) if case["top_k"] == 2 else ():
            pairs[first].append(case["sets"][f"[{first}, {second}]"]["kl"] / best)
    assert [round(min(pairs[0])), round(max(pairs[0]))] == [23, 78]
    assert [round(min(pairs[1]), 1), round(max(pairs[1]), 1)] == [1.5, 3.5]


def test_what_the_text_says_of_ga_s2_is_in_the_stored_figures():
    choices = regrets_of("ga_s2")
    missed = [choice["keep"] for choice in choices if choice["regret"] > 1]
    assert (len(choices), len(missed)) == (8, 5) and all(0 not in keep and 1 in keep for keep in missed)
    assert min(choice["recall_lost"] for choice in choices) == pytest.approx(-0.0195, abs=1e-4)
    shares = [choice["tokens"] / (8 * 200 * 16 * 512) for choice in choices]
    assert (min(shares), max(shares)) == pytest.approx((0.20, 0.35))
    for name, share in {"tokens": 1 / 4, "flops": 1 / 3, "seconds": 1 / 2}.items():
        gates, ga_s2 = (sum(choice[name] for choice in regrets_of(method)) for method in ("gates", "ga_s2"))
        assert gates / ga_s2 == pytest.approx(share, abs=0.05)


def test_what_the_text_says_of_recall_in_the_middle_is_in_the_stored_figures():
    (case,) = build.REGRETS["regret_deep"]["cases"]
    sets = {tuple(json.loads(kept)): figures for kept, figures in case["sets"].items()}
    best = sets[3, 5]
    assert case["best"] == "[3, 5]" and best["recall"] == 1
    for seed in "012":
        assert best["kl_by_seed"][seed] == min(its["kl_by_seed"].get(seed, 1) for its in sets.values())
    spans = {}
    for first, second in ((5, 3), (3, 5)):
        ratios = [its["kl"] / best["kl"] for kept, its in sets.items() if first in kept and second not in kept]
        spans[first] = (round(min(ratios), 1), round(max(ratios), 1))
    assert spans == {5: (1.6, 1.9), 3: (3.6, 3.7)}
    neither = [its for kept, its in sets.items() if not {3, 5} & set(kept)]
    ratios = [its["kl"] / best["kl"] for its in neither]
    assert (round(min(ratios)), round(max(ratios))) == (15, 16)
    assert max(its["recall"] for its in neither) == pytest.approx(0.80, abs=0.003)
    choices = {
        method: regrets_of(method, "regret_deep")[0] for method in ("gates", "ga_s2", "scan", "rounds", "ar", "ppl")
    }
    keeps = [[3, 5], [3, 5], [3, 5], [2, 5], [0, 2], [1, 2]]
    assert [choice["keep"] for choice in choices.values()] == keeps
    for name, times in {"tokens": 4, "seconds": 5.4}.items():
        assert choices["ga_s2"][name] / choices["gates"][name] == pytest.approx(times, abs=0.05)


def test_what_the_text_says_of_the_aims_is_in_the_stored_figures():
    """The first table of results.md."""
    results = json.loads(read("docs/results.json"))
    teacher, names = results["teacher"], real_model_report.by_name(results["rows"])
    tasks = real_model_report.tasks_of(teacher)
    text = read("docs/results.md")
    for name, label in (
        ("15 kept by gates, swa_v1, window 512", "windows of 512 with sinks"),
        ("8 kept by gates, swa_v1, window 512", "windows of 512 with sinks"),
        ("4 kept by gates, swa_v1, window 512", "windows of 512 with sinks"),
        ("15 kept, gates, mixture", "linear attention, `gdn_v7`"),
        ("8 kept, gates, mixture", "linear attention, `gdn_v7`"),
        ("4 kept, gates, mixture", "linear attention, `gdn_v7`"),
        ("8 kept by gates, 100M tokens", "linear attention, 100M tokens"),
    ):
        rows = names[name]
        mean = statistics.fmean
        cells = [f"{mean(real_model_report.ratio(row, teacher) for row in rows):.3f}"]
        cells += [f"{mean(row['figures']['kl'] for row in rows):.3f}"]
        cells += [f"{100 * mean(real_model_report.recall(row, teacher) for row in rows):.1f}"]
        shares = [real_model_report.share(row, teacher, task) for row in rows for task in tasks]
        cells += [f"{100 * mean(min(value, 1) for value in shares):.1f}"]
        for task in ("two_hops", "needle_8192"):
            cells += [f"{100 * mean(real_model_report.share(row, teacher, task) for row in rows):.0f}"]
        assert f"| | {label} | {' | '.join(cells)} |" in text, name


def test_selectors_on_a_real_model_have_the_figures_of_the_results():
    """The table of layer_selection.md, against the longer one of results.md."""
    names = {"middle": "the middle layers", **{name: f"`{name}`" for name in ("ga_s2", "ar", "uniform")}}
    names |= {f"gates, {objective}": f"`gates`, {objective}" for objective in ("mixture", "KL")}
    text = read("docs/layer_selection.md")
    table = real_model_report.selectors_table(json.loads(read("docs/results.json"))).splitlines()[2:]
    for line in table:
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        row = f"| {' | '.join([names[cells[1]], *cells[8:]])} |".replace("|  |", "| |").replace("|  |", "| |")
        assert row in text, row
    assert len(table) == 11


def test_the_front_page_has_figures_of_the_performance_page():
    row = r"^\| [123].*\| \d+ x \d+ \| ([\d,]+) \| ([\d.]+ GiB) \|"
    found = re.findall(row, read("README.md"), re.MULTILINE)
    assert len(found) == 3
    lines = read("docs/performance.md").splitlines()
    for speed, memory in found:
        with_both = [line for line in lines if f"| {speed} |" in line and f"| {memory} |" in line]
        assert with_both, speed


def test_the_keys_that_a_resumed_run_may_change_are_listed():
    section = read("docs/reliability.md").partition("## What may change")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) - {"train"} == FREE_KEYS


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"$', read("pyproject.toml"), re.MULTILINE)[1]
    newest_change = re.search(r"^## \[(.*?)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert newest_change == version


def test_forms_and_workflows_are_valid_yaml():
    files = list((ROOT / ".github").rglob("*.yml"))
    assert len(files) >= 3
    assert all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)


def test_the_workflow_lints_tests_and_runs_the_quickstart():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = {step.get("run") for step in steps}
    assert {"ruff check", "ruff format --check"} <= commands
    assert {"bash run_tests.sh", "bash quickstart.sh --tiny"} <= commands


def test_the_pipeline_picture_is_valid_xml():
    root = xml.etree.ElementTree.parse(ROOT / "docs" / "pipeline.svg").getroot()
    assert root.tag.endswith("svg")
