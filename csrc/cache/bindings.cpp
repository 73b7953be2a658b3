// The only file of the cache that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cache.h"

namespace py = pybind11;
using namespace tokenspeed::cache;

namespace {

// Tokens of any C-contiguous one-dimensional int32 buffer (array('i'), numpy.int32): read where they are, never copied.
class TokenBuffer {
  public:
    explicit TokenBuffer(const py::object& object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_ND | PyBUF_FORMAT) != 0) {
            PyErr_Clear();
            throw py::type_error(kWanted);
        }
        const char* format = view_.format;
        if (view_.ndim != 1 || view_.itemsize != sizeof(Token) || format == nullptr ||
            (format[0] != 'i' && format[0] != 'l') || format[1] != '\0') {
            PyBuffer_Release(&view_);
            throw py::type_error(kWanted);
        }
    }
    ~TokenBuffer() { PyBuffer_Release(&view_); }
    TokenBuffer(const TokenBuffer&) = delete;
    TokenBuffer& operator=(const TokenBuffer&) = delete;

    std::span<const Token> span() const {
        return {static_cast<const Token*>(view_.buf), static_cast<size_t>(view_.shape[0])};
    }

  private:
    static constexpr const char* kWanted = "tokens must be a contiguous one-dimensional int32 buffer";
    Py_buffer view_{};
};

template <class Range, class Convert>
py::tuple tuple_of(const Range& range, Convert convert) {
    py::tuple result(range.size());
    for (size_t i = 0; i < range.size(); ++i) result[i] = convert(range[i]);
    return result;
}

template <class T>
py::object outcome(Result<T> result) {
    return std::visit([](auto&& value) { return py::cast(std::move(value)); }, std::move(result));
}

py::object outcome(Result<Done> result) {
    if (std::holds_alternative<Done>(result)) return py::none();
    return py::cast(std::get<Error>(result));
}

py::object outcome(Result<std::span<const PageId>> result) {
    if (auto* pages = std::get_if<std::span<const PageId>>(&result))
        return tuple_of(*pages, [](PageId id) { return py::int_(id); });
    if (auto* missing = std::get_if<NoRoom>(&result)) return py::cast(*missing);
    return py::cast(std::get<Error>(result));
}

py::tuple as_tuple(const Event& event) {
    switch (event.kind) {
        case Event::Kind::kCleared:
            return py::make_tuple("cleared");
        case Event::Kind::kRemoved:
            return py::make_tuple("removed", event.block);
        default:
            py::object parent = event.parent == kNoNode ? py::object(py::none()) : py::cast(event.parent);
            return py::make_tuple("stored", event.block, std::move(parent), event.name_space, py::cast(event.tokens));
    }
}

py::dict as_dict(const Stats& s) {
    py::dict d;
#define FIELD(name) d[#name] = s.name
    FIELD(admissions), FIELD(no_room), FIELD(forks), FIELD(finished), FIELD(aborted);
    FIELD(prompt_tokens), FIELD(cached_tokens), FIELD(known_tokens), FIELD(kv_matched_tokens);
    FIELD(recomputed_matched_tokens), FIELD(snapshots_promised), FIELD(snapshots_declined);
    FIELD(snapshots_published), FIELD(snapshots_donated), FIELD(snapshots_redundant), FIELD(snapshots_evicted);
    FIELD(snapshots_consumed), FIELD(snapshot_hits), FIELD(received), FIELD(received_tokens), FIELD(lent);
    FIELD(moved_out), FIELD(moved_out_pages), FIELD(moves_void), FIELD(moved_in), FIELD(moved_in_pages);
    FIELD(moved_in_tokens), FIELD(host_evicted), FIELD(snapshots_left_to_host), FIELD(host_pages_free);
    FIELD(host_slots_free), FIELD(moves_under_way), FIELD(pinned), FIELD(pages_evicted), FIELD(ghosts_dropped);
    FIELD(page_copies), FIELD(pages_appended_in_place), FIELD(pages_free), FIELD(pages_held);
    FIELD(pages_evictable), FIELD(slots_free), FIELD(slots_working), FIELD(slots_promised);
    FIELD(slots_snapshot), FIELD(slots_draining), FIELD(running), FIELD(nodes), FIELD(ghosts);
    FIELD(namespaces), FIELD(usual_reuse_time), FIELD(superseded_weight), FIELD(bookkeeping_bytes), FIELD(token_bytes);
#undef FIELD
    return d;
}

}  // namespace

PYBIND11_MODULE(_cache, m) {
    m.doc() = "The logical hybrid prefix cache. See csrc/cache/cache.h for the contract.";

    py::enum_<Policy>(m, "Policy").value("VALUE", Policy::kValue).value("LRU", Policy::kLru);
    py::enum_<Reason>(m, "Reason", "Why a prompt resumes where it does and not later.")
        .value("COLD", Reason::kCold)
        .value("NEW_TOKENS", Reason::kNewTokens)
        .value("WHOLE_PROMPT_KNOWN", Reason::kWholePromptKnown)
        .value("NO_SNAPSHOT", Reason::kNoSnapshot)
        .value("COMPUTED_SOONER", Reason::kComputedSooner)
        .value("SNAPSHOT_EVICTED", Reason::kSnapshotEvicted)
        .value("PENDING", Reason::kPending)
        .value("PROMPT_LOGPROBS", Reason::kPromptLogprobs)
        .value("TIGHT_MEMORY", Reason::kTightMemory)
        .value("DISABLED", Reason::kDisabled);
    py::enum_<Error>(m, "Error", "The call is wrong, whatever the load.")
        .value("UNKNOWN_REQUEST", Error::kUnknownRequest)
        .value("DUPLICATE_REQUEST", Error::kDuplicateRequest)
        .value("EMPTY_PROMPT", Error::kEmptyPrompt)
        .value("TOO_LARGE", Error::kTooLarge)
        .value("BEYOND_PAGES", Error::kBeyondPages)
        .value("TOKENS_MISSING", Error::kTokensMissing)
        .value("BACKWARDS", Error::kBackwards)
        .value("MOVING", Error::kMoving)
        .value("UNKNOWN_MOVE", Error::kUnknownMove)
        .value("DISABLED", Error::kDisabled);

    py::class_<NoRoom>(m, "NoRoom", "Not now: what is missing after every possible eviction.")
        .def_readonly("pages_short", &NoRoom::pages_short)
        .def_readonly("slots_short", &NoRoom::slots_short)
        .def("__repr__", [](const NoRoom& n) {
            return "NoRoom(pages_short=" + std::to_string(n.pages_short) +
                   ", slots_short=" + std::to_string(n.slots_short) + ")";
        });
    py::class_<Match>(m, "Match", "What is known of a prompt, in tokens, and why no more is reused.")
        .def_readonly("known_tokens", &Match::known_tokens)
        .def_readonly("kv_tokens", &Match::kv_tokens)
        .def_readonly("state_tokens", &Match::state_tokens)
        .def_readonly("moved_tokens", &Match::moved_tokens)
        .def_readonly("pending_tokens", &Match::pending_tokens)
        .def_readonly("reason", &Match::reason)
        .def("__repr__", [](const Match& a) {
            return "Match(known_tokens=" + std::to_string(a.known_tokens) +
                   ", kv_tokens=" + std::to_string(a.kv_tokens) + ", state_tokens=" + std::to_string(a.state_tokens) +
                   ", pending_tokens=" + std::to_string(a.pending_tokens) +
                   ", reason=" + py::str(py::cast(a.reason)).cast<std::string>() + ")";
        });
    py::class_<Admission>(m, "Admission", "Pages, slots, copies and promised snapshots of an admitted sequence.")
        .def_readonly("match", &Admission::match)
        .def_property_readonly(
            "pages", [](const Admission& a) { return py::array_t<PageId>(a.pages.size(), a.pages.data()); },
            "[ceil((prompt + 1) / page_tokens)] int32, a new array at each access")
        .def_readonly("read_slot", &Admission::read_slot)
        .def_readonly("write_slot", &Admission::write_slot)
        .def_readonly("move", &Admission::move)
        .def_property_readonly(
            "copies",
            [](const Admission& a) {
                return tuple_of(a.copies, [](const Copy& c) { return py::make_tuple(c.source, c.target, c.rows); });
            },
            "((source page, target page, rows), ...)")
        .def_property_readonly(
            "snapshots",
            [](const Admission& a) {
                return tuple_of(a.snapshots,
                                [](const PromisedSnapshot& s) { return py::make_tuple(s.tokens, s.slot); });
            },
            "((tokens, slot), ...), ascending");
    auto pages_of = [](const auto& a) { return py::array_t<PageId>(a.pages.size(), a.pages.data()); };
    py::class_<Reception>(m, "Reception", "Where the bytes of a prefix that comes from elsewhere go.")
        .def_readonly("kv_tokens", &Reception::kv_tokens)
        .def_property_readonly(
            "pages", [=](const Reception& a) { return pages_of(a); }, "[pages] int32, a new array")
        .def_readonly("slot", &Reception::slot);
    py::class_<Loan>(m, "Loan", "What is there of a prefix, pinned.")
        .def_readonly("kv_tokens", &Loan::kv_tokens)
        .def_readonly("state_tokens", &Loan::state_tokens)
        .def_property_readonly(
            "pages", [=](const Loan& a) { return pages_of(a); }, "[pages] int32, a new array")
        .def_readonly("slot", &Loan::slot);
    py::class_<Fork>(m, "Fork", "A second sequence, and the slots the parent uses from its next step on.")
        .def_readonly("child", &Fork::child)
        .def_readonly("parent_read", &Fork::parent_read)
        .def_readonly("parent_write", &Fork::parent_write);

    py::class_<Cache>(m, "Cache")
        .def(py::init([](int32_t pages, int32_t slots, int32_t host_pages, int32_t host_slots, int32_t page_tokens,
                         int32_t ghost_nodes, int32_t grid_tokens, Policy policy, bool branch_points, bool enabled) {
                 auto cache = Cache::create({pages, slots, host_pages, host_slots, page_tokens, ghost_nodes,
                                             grid_tokens, policy, branch_points, enabled});
                 if (!cache) throw py::value_error("impossible cache configuration");
                 return cache;
             }),
             py::kw_only(), py::arg("pages"), py::arg("slots"), py::arg("host_pages") = 0, py::arg("host_slots") = 0,
             py::arg("page_tokens") = 64, py::arg("ghost_nodes") = 0, py::arg("grid_tokens") = 0,
             py::arg("policy") = Policy::kValue, py::arg("branch_points") = true, py::arg("enabled") = true)
        .def("probe",
             [](const Cache& c, std::string_view name_space, const py::object& tokens, bool prompt_logprobs) {
                 return c.probe(name_space, TokenBuffer(tokens).span(), prompt_logprobs);
             })
        .def("admit",
             [](Cache& c, RequestId id, std::string_view name_space, const py::object& tokens,
                const std::vector<int32_t>& boundaries, bool prompt_logprobs) {
                 return outcome(c.admit(id, name_space, TokenBuffer(tokens).span(), boundaries, prompt_logprobs));
             })
        .def("extend", [](Cache& c, RequestId id, int32_t count) { return outcome(c.extend(id, count)); })
        .def("commit", [](Cache& c, RequestId id, const py::object& tokens,
                          int32_t count) { return outcome(c.commit(id, TokenBuffer(tokens).span(), count)); })
        .def("fork", [](Cache& c, RequestId parent, RequestId child, const py::object& tokens,
                        int32_t count) { return outcome(c.fork(parent, child, TokenBuffer(tokens).span(), count)); })
        .def("finish", [](Cache& c, RequestId id, const py::object& tokens, int32_t count,
                          bool donate) { return outcome(c.finish(id, TokenBuffer(tokens).span(), count, donate)); })
        .def("abort", [](Cache& c, RequestId id) { return outcome(c.abort(id)); })
        .def("receive",
             [](Cache& c, RequestId id, std::string_view name_space, const py::object& tokens) {
                 return outcome(c.receive(id, name_space, TokenBuffer(tokens).span()));
             })
        .def("received", [](Cache& c, RequestId id) { return outcome(c.received(id)); })
        .def("lend",
             [](Cache& c, RequestId id, std::string_view name_space, const py::object& tokens) {
                 return outcome(c.lend(id, name_space, TokenBuffer(tokens).span()));
             })
        .def("release", [](Cache& c, RequestId id) { return outcome(c.release(id)); })
        .def("take_moves",
             [](Cache& c) {
                 return tuple_of(c.take_moves(), [](const Move& m) {
                     auto pages = [&](auto member) {
                         return tuple_of(m.pages, [=](const auto& pair) { return py::int_(pair.*member); });
                     };
                     using Pair = std::pair<PageId, PageId>;
                     return py::make_tuple(m.id, m.out, pages(&Pair::first), pages(&Pair::second), m.source, m.target);
                 });
             })
        .def("moved", [](Cache& c, int64_t move) { return outcome(c.moved(move)); })
        .def("set_costs", [](Cache& c, double page, double slot, double token) { c.set_costs({page, slot, token}); })
        .def("clear", &Cache::clear)
        .def("log_events", &Cache::log_events)
        .def("drain_events", [](Cache& c) { return tuple_of(c.drain_events(), as_tuple); })
        .def("clear_all", &Cache::clear_all)
        .def("stats", [](const Cache& c) { return as_dict(c.stats()); })
        .def("check", &Cache::check);
}
