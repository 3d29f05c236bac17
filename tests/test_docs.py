"""README.md, docs/ and the other pages a visitor reads: what they link to and name exists, and generated parts are current."""

import importlib.util
import json
import re
import xml.etree.ElementTree
from pathlib import Path

from runtime.config import reference

import pytest
import yaml

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
DIRECTORIES = (".ci", "benchmarks", "configs", "convert", "distill_model", "docs", "ds_configs", "layer_selection")
DIRECTORIES += ("quickstart", "runtime", "tests")
OF_THE_PREDECESSOR = {"eval/harness.py"}  # docs/migration.md names it as such
CODE = {
    path: path.read_text()
    for pattern in ("*.py", "*.sh", *(f"{directory}/**/*.py" for directory in DIRECTORIES))
    for path in ROOT.glob(pattern)
}

spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def every_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(function)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued lines joined; and commands in backticks."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    inline = re.findall(r"`((?:python|bash|deepspeed) [^`]+)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in lines + inline]


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 15_000


def test_every_page_can_be_reached_from_the_front_page():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(links)


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    named = set(re.findall(r"`([\w./-]+)`", page.read_text())) - OF_THE_PREDECESSOR
    scripts = {path.name for path in CODE}
    for name in named:
        if name.split("/")[0] in DIRECTORIES and "/" in name:
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"[\w.-]+\.(py|sh)", name):
            assert name in scripts, name


@every_page
def test_commands_that_are_shown_can_be_typed(page):
    """Their scripts exist and know the flags; their configs exist; the keys that they override are keys."""
    keys = set(re.findall(r"^\| `([\w.]+)`", reference(), re.MULTILINE))
    flags = set(re.findall(r"--[a-z][\w-]*", "\n".join(CODE.values())))
    of_others = {"--check", "--gen_kwargs", "--help", "--no-deps", "--nodes", "--num_gpus"}
    for command in commands(page):
        assert all((ROOT / script).is_file() for script in re.findall(r"[\w./-]+\.(?:py|sh)\b", command)), command
        assert all((ROOT / config).is_file() for config in re.findall(r"\bconfigs/[\w./-]+\.yaml", command)), command
        assert set(re.findall(r"(?<=\s)--[a-z][\w-]*", command)) <= flags | of_others, command
        assert set(re.findall(r"\b((?:train|data|student_model|teacher_model)\.\w+)=", command)) <= keys, command


@pytest.mark.parametrize("page", build.GENERATED)
def test_generated_parts_are_current(page):
    """If not: python docs/build.py."""
    assert build.with_generated(page) == (ROOT / "docs" / page).read_text()


def test_the_decoding_table_is_that_of_the_stored_points():
    page = (ROOT / "docs" / "generation.md").read_text()
    for point in json.loads((ROOT / "docs" / "decode.json").read_text())["points"]:
        speeds = f"{point['teacher_tokens_per_s']:,} | {point['hybrid_tokens_per_s']:,} | {point['speed_up']:.2f}"
        caches = f"{point['teacher_cache_mib']:,} MiB | {point['hybrid_cache_mib']:,} MiB | {point['cache_share']:.0%}"
        row = (
            f"| {point['batch_size']} | {point['context']:,} | {speeds} | {point['roofline_speed_up']:.2f} | {caches} |"
        )
        assert row in page


def test_the_figures_of_the_front_page_are_those_of_the_performance_page():
    front, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| [123][^|]*\| [^|]*tokens \| ([\d,]+) \| ([\d.]+ GiB) \|", front, re.MULTILINE)
    assert len(rows) == 3
    for speed, memory in rows:
        assert any(f"| {speed} |" in line and f"| {memory} |" in line for line in page.splitlines()), speed


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == version


def test_forms_and_workflows_are_valid_yaml():
    files = [*(ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 3
    assert all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)


def test_the_workflow_runs_what_the_documentation_names():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"ruff check", "ruff format --check", "bash run_tests.sh", "bash quickstart.sh --tiny"} <= set(run)


def test_the_picture_is_valid_xml():
    assert xml.etree.ElementTree.parse(ROOT / "docs" / "pipeline.svg").getroot().tag.endswith("svg")
