"""Bugs planted in csrc/cache, one at a time: the fuzz driver notices each.

All are compiled into one binary, each behind a switch, so that the sources are compiled once.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = 1_000_000  # that a bug may survive; most last a few thousand


class Bug(NamedTuple):
    """`old` becomes `new`: both expressions, or both statements (then `old` ends with a semicolon).

    within: text that stands once in the file and holds `old` once, where `old` alone does not."""

    name: str
    file: str
    old: str
    new: str
    within: str = ""


ADDRESS = "reinterpret_cast<uintptr_t>(&tree_[{}]) * 0x9e3779b97f4a7c15u"
BUGS = (
    # What a running sequence reads is pinned, and released when it ends.
    Bug("matched pages are not pinned", "admit.cpp", "lock(standing);", "", "lock(standing);\n    if"),
    Bug("the snapshot resumed from is not pinned", "admit.cpp", "lock(request.source);", ""),
    Bug("a refusal keeps its pin", "admit.cpp", "unlock(standing);", ""),
    Bug(
        "the source is let go at once",
        "requests.cpp",
        "count > request.resume",
        "true",
        "if (count > request.resume) release_source",
    ),
    Bug("publishing forgets the older lock", "requests.cpp", "unlock(locked);", ""),
    Bug("the lock outlives its sequence", "requests.cpp", "unlock(locked_node(request));", ""),
    Bug("the path is kept after its sequence", "requests.cpp", "unkeep(kept_node(request));", ""),
    Bug("a shared slot is not counted", "pools.h", "++pool_->references_[id_];", ""),
    Bug("a shared page is not held", "pools.h", "add_hold(id);", "", "if (hold) add_hold(id);"),
    Bug("a slot that others read is consumed", "admit.cpp", "slots_.references(request.source_slot.id()) == 2", "true"),
    Bug(
        "a slot that is read is evicted",
        "evict.cpp",
        "record.slot.unique()",
        "true",
        "return record.slot.unique();  // else",
    ),
    Bug(
        "a locked unit is evicted for its pages",
        "evict.cpp",
        "node.locks == 0",
        "true",
        "return node.state && node.locks == 0",
    ),
    # A page has one writer, and rows below its fill stay.
    Bug("rows that are in use are appended over", "admit.cpp", "pages_.fill(room.partial) == resume % page", "true"),
    Bug("two sequences append to a page", "admit.cpp", "!pages_.has_writer(room.partial)", "true"),
    Bug("a new page has no writer", "requests.cpp", "pages_.set_writer(id, true);", ""),
    Bug("the writer outlives its sequence", "requests.cpp", "pages_.set_writer(request.pages[i], false);", ""),
    Bug(
        "the first page stored to is off by one",
        "admit.cpp",
        "request.writes_from = found.shared;",
        "request.writes_from = found.shared + 1;",
    ),
    Bug("a copy lacks a row", "admit.cpp", "resume % page", "resume % page - 1", "[found.shared], resume % page"),
    Bug("a page does not know how far it is filled", "evict.cpp", "pages_.raise_fill(page, node.length);", ""),
    Bug("a fork's rows are not filled", "requests.cpp", "pages_.raise_fill(parent.pages[i], page);", ""),
    Bug("a tail takes another text's page", "tree.cpp", "!equal(this->tokens(child), tokens, length)", "false"),
    Bug("a ghost's page is never returned", "evict.cpp", "pages_.remove(node.page, false);", ""),
    Bug("a fork's duplicates are not counted", "requests.cpp", "tree_[child.path[i]].page != parent.pages[i]", "0"),
    # Units and ghosts.
    Bug(
        "a snapshot outlives its pages",
        "evict.cpp",
        "!node.state",
        "true",
        "resident_children == 0 && !node.state)\n",
    ),
    Bug(
        "a page goes before those beyond it",
        "evict.cpp",
        "node.resident_children == 0",
        "true",
        "&& node.resident_children == 0 && !node.state)\n",
    ),
    Bug(
        "a ghost too many is kept",
        "evict.cpp",
        "ghosts_.size() > config_.ghost_nodes",
        "ghosts_.size() > config_.ghost_nodes + 1",
    ),
    Bug(
        "ties are broken by address",
        "evict.cpp",
        "record.sequence > sequence",
        f"{ADDRESS.format('record.node')} > {ADDRESS.format('found->node')}",
    ),
    Bug("gains are not updated", "snapshots.cpp", "stand(tree, records_.back());", ""),
    Bug("a snapshot is promised but not counted", "requests.cpp", "++promised_;", ""),
    Bug("a promised slot stays counted", "requests.cpp", "--promised_;", ""),
    Bug("a promise outlives its sequence", "requests.cpp", "--tree_[promised.node].promises;", ""),
    # How much room there is.
    Bug(
        "a page too many is promised",
        "evict.cpp",
        "pages - pages_.free() - pages_.evictable()",
        "pages - pages_.free() - pages_.evictable() - 1",
    ),
    Bug("a page too few is freed", "evict.cpp", "pages_.free() < pages", "pages_.free() + 1 < pages"),
    Bug("a fork needs one slot always", "requests.cpp", "convert ? 2 : 1", "1"),
    Bug(
        "a commit beyond the pages held is accepted",
        "requests.cpp",
        "pages_for(count) > static_cast<int64_t>(it->second.pages.size())",
        "false",
    ),
    Bug("a commit may go back", "requests.cpp", "count < it->second.committed", "false"),
    Bug(
        "a page is added a token early",
        "requests.cpp",
        "pages_for(count) - held",
        "count / config_.page_tokens + 1 - held",
    ),
    Bug(
        "a page is added a token late",
        "requests.cpp",
        "pages_for(count) - held",
        "(count - 1) / config_.page_tokens - held",
    ),
    # Matching.
    Bug(
        "the last token is not computed",
        "admit.cpp",
        "static_cast<int32_t>(prompt.size()) - 1",
        "static_cast<int32_t>(prompt.size())",
    ),
    Bug("the last token's page is shared", "match.cpp", "std::min(resident, cap / page)", "resident"),
    Bug(
        "a state at the cap is overlooked",
        "match.cpp",
        "end <= cap",
        "end < cap",
        "if (here.state && end <= cap) {",
    ),
    Bug("a ghost's page is shared", "match.cpp", "tree_[node].resident()", "true"),
    Bug(
        "other tokens match",
        "tree.cpp",
        "equal(this->tokens(child), tokens, length)",
        "true",
        "equal(this->tokens(child), tokens, length) ? child",
    ),
    Bug(
        "whole pages are published late",
        "requests.cpp",
        "count / config_.page_tokens",
        "(count - 1) / config_.page_tokens",
        "int32_t full = config_.enabled ? count / config_.page_tokens : 0",
    ),
    Bug("a snapshot is promised twice", "admit.cpp", "tokens <= previous", "tokens <= 0"),
    Bug(
        "a passed snapshot is published a token early",
        "requests.cpp",
        "request.promised[passed].tokens <= count",
        "request.promised[passed].tokens <= count + 1",
    ),
    Bug("a state that was never written is donated", "requests.cpp", "donate && count > request.resume", "donate"),
    # Host memory.
    Bug(
        "a slot is given away while it is copied, and the copy counts",
        "tiers.cpp",
        "make_void(record);",
        "",
        "if (record.move != 0) make_void(record);\n    SlotRef slot",
    ),
    Bug(
        "what is cleared goes on to host memory",
        "tiers.cpp",
        "make_void(record);",
        "",
        "if (record.move != 0) make_void(record);\n    const bool host",
    ),
    Bug("a void move keeps its host pages", "tiers.cpp", "host_pages_.remove(page, true);", ""),
    Bug(
        "a void move is forgotten at once",
        "tiers.cpp",
        "move == outgoing_.end()",
        "move == outgoing_.end() || move->node == kNoNode",
    ),
    Bug("pages above a move out may leave host memory", "tiers.cpp", "host_use(outgoing.base);", ""),
    Bug("a host page outlives its snapshot", "tiers.cpp", "if (host) host_drop(id);", ""),
    Bug("a page that is on its way is sent again", "tiers.cpp", "std::ranges::none_of(outgoing_, shares)", "true"),
    Bug("the pages of a move back are not pinned", "admit.cpp", "host_use(found.host);", ""),
    Bug("the nodes of a move back are not kept", "admit.cpp", "keep(found.host);", ""),
    Bug("a move back lacks a page", "admit.cpp", "index < found.shared", "index <= found.shared"),
    Bug(
        "a sequence goes on before its state is back",
        "requests.cpp",
        "it->second.move != 0",
        "false",
        "if (it->second.move != 0) return Error::kMoving;\n    if (count",
    ),
    Bug(
        "a sequence is aborted while it is written to",
        "requests.cpp",
        "it->second.move != 0",
        "false",
        "if (it->second.move != 0) return Error::kMoving;\n    ++counters_",
    ),
    Bug("a state that comes back is to be written by the prefill", "admit.cpp", "promised.tokens > resume", "true"),
    Bug(
        "what comes back is matched before it is there",
        "match.cpp",
        "here.state",
        "here.has_snapshot()",
        "if (here.state && end <= cap) {",
    ),
    Bug("a move back is told to its request alone", "tiers.cpp", "publish(request, {}, request.resume);", ""),
    # Prefixes from elsewhere.
    Bug("a reception is there before it came", "transfer.cpp", "std::min(found.shared * page, count - 1)", "count"),
    Bug("what was received is not pinned", "transfer.cpp", "lock(node);", ""),
    Bug("what is lent is not pinned", "transfer.cpp", "lock(request.source);", ""),
    Bug("a lent page may be replaced", "transfer.cpp", "pages_.add(request.source_page, true);", ""),
    # Namespaces.
    Bug("namespaces are one", "requests.cpp", "roots_.find(name_space)", "roots_.begin()"),
    Bug("a cleared namespace goes on", "evict.cpp", "tree_[root].cleared = true;", ""),
    Bug("a cleared namespace keeps what runs in it", "requests.cpp", "purge(request.root);", ""),
    Bug(
        "only names are cleared",
        "evict.cpp",
        "forget(root);",
        "",
        "for (const auto& [name, root] : roots) forget(root);",
    ),
)

MAIN = """
int main(int, char** arguments) {
    tokenspeed::cache::planted = std::atoi(arguments[1]);
    return fuzz(3, arguments + 1);
}
"""


def plant(file: str, source: str) -> str:
    """The source with this file's bugs in it, each behind its number in `BUGS`, counted from 1."""
    bugs_at: dict[tuple[int, int], list[tuple[int, Bug]]] = {}
    for number, bug in enumerate(BUGS, 1):
        if bug.file == file:
            context = bug.within or bug.old
            assert source.count(context) == context.count(bug.old) == 1, f"{file}, {bug.name}: {context}"
            start = source.index(context) + context.index(bug.old)
            bugs_at.setdefault((start, start + len(bug.old)), []).append((number, bug))
    parts, done = [], 0
    for (start, end), bugs in sorted(bugs_at.items()):
        assert start >= done, f"{file}: {bugs} lie in the text of others"
        text = source[start:end]
        for number, bug in bugs:
            if bug.old.endswith(";"):
                text = f"if (planted == {number}) {{ {bug.new} }} else {{ {text} }}"
            else:
                text = f"(planted == {number} ? ({bug.new}) : ({text}))"
        parts += [source[done:start], text]
        done = end
    return "".join(parts) + source[done:]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """`driver BUG OPERATIONS SEED`, where bug 0 is none."""
    folder = tmp_path_factory.mktemp("planted")
    sources = [path for path in sorted((ROOT / "csrc/cache").iterdir()) if path.name != "bindings.cpp"]
    assert {bug.file for bug in BUGS} <= {path.name for path in sources}
    for path in sources:
        (folder / path.name).write_text(plant(path.name, path.read_text()))
    (folder / "fuzz.cpp").write_text(
        (ROOT / "tests/cache/fuzz.cpp").read_text().replace("int main(", "int fuzz(") + MAIN
    )
    one = ["#include <cstdint>", "namespace tokenspeed::cache { inline int planted = 0; }"]
    one += [f'#include "{path.name}"' for path in sources if path.suffix == ".cpp"] + ['#include "fuzz.cpp"']
    (folder / "one.cpp").write_text("\n".join(one) + "\n")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-D_GLIBCXX_ASSERTIONS"]
    subprocess.run([*compiler, str(folder / "one.cpp"), "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def run(driver: Path, bug: int, operations: int) -> subprocess.CompletedProcess:
    command = [str(driver), str(bug), str(operations), "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_without_a_bug_nothing_is_noticed(driver):
    result = run(driver, 0, 500_000)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_noticed(driver, number):
    assert run(driver, number, OPERATIONS).returncode != 0
