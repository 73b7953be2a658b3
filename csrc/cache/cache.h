// The logical hybrid prefix cache: decides which KV pages and recurrent-state slots a sequence uses.
// It moves no bytes, reads no clock and knows no tensor library: pages and slots are plain integers.
//
// THINGS
//   page      `page_tokens` consecutive tokens' keys and values, all layers. Append-only.
//   slot      the recurrent state of one sequence after some number of tokens.
//   snapshot  (exact token count, slot, the pages under it); the last page may be partly filled.
//   node      one page of token ids in a radix tree. Full nodes carry children; a node shorter than a page is a tail
//             (the ragged end of a snapshot). Children are ordered by token content: finding compares tokens, and
//             nothing is hashed.
//   ghost     a node whose page was taken away. Its token ids stay, up to `ghost_nodes` of them, so that a branch point
//             is recognised after its KV is gone.
//
// A SEQUENCE'S LIFE
//   probe     pure: how much of a prompt is known, and why not more.
//   admit     all or nothing. Pins what it matched, evicts, returns pages, slots, copies and the promised snapshots.
//   extend    pages so that `count` tokens fit.
//   commit    publishes verified tokens [0, count): whole pages become nodes, promised snapshots at or below `count`
//             become matchable. Called at reconcile. `tokens` is the whole sequence so far; only the part that is not
//             yet published is read. Calling it again with the same count changes nothing.
//   fork      a second sequence continues at `count`.
//   finish    commit(count), then the working slot becomes a snapshot at exactly `count` and everything else returns.
//             Preemption is finish, and later admit with prompt + output as the prompt.
//   abort     everything returns; what was committed stays in the tree.
//
// A PREFIX THAT COMES FROM ELSEWHERE, OR GOES THERE (another engine: whoever calls moves the bytes)
//   receive   all or nothing: pages for what is missing of a prefix and a slot for the state at its end. Nobody matches
//             it yet; a prompt that would sees it as pending.
//   received  the bytes are there: the prefix is matched like any other, and stays pinned.
//   lend      pins what is there of a prefix: the pages it shares, and the deepest state in it.
//   release   the pin goes. Of a prefix that was not received everything returns: nobody may write there any more.
//
//   clear     forgets a namespace, clear_all every one: a later prompt finds nothing of it. Sequences that run keep
//             their pages, slots and promises, and may be forked; what they commit or donate from then on is found by
//             nobody, and returns with the last of them.
//
// WHO MAY TOUCH WHAT, AND WHEN (the engine plans one step ahead of the device)
//   - commit, finish and abort are called when the last launched step that holds the sequence is reconciled. What they
//     release is used by no launched step, so it is free at once. Between the decision to end a sequence and that call
//     its pages and slots are *retiring*: still the sequence's own.
//   - A snapshot's label is the number of tokens consumed by all launched steps: finish(count) takes that number.
//   - read_slot, and the source page of a copy, stay pinned until the first commit beyond the resume point. So nothing
//     that a step reads is given away while that step is planned or in flight, and eviction may reuse what it takes
//     in the same plan: nobody pinned it, so no step reads it.
//   - write_slot and every page the sequence stores into belong to it alone. A partly filled page has at most one
//     writer: rows below its fill are never stored again; anyone else copies rows [0, r) into a page of its own.
//   - Stores of tokens below Admission::kv_tokens must be skipped: those pages are shared.
//   - Promised snapshot slots belong to the sequence from admit to the commit that passes them.
//
// THE HOST TIER (`host_pages` and `host_slots` above 0)
//   A *unit* is a snapshot with the pages under it. What is about to go from the device is copied to host memory ahead
//   of need, so that eviction finds copies there and costs nothing. A prompt whose deepest state is in host memory
//   alone is admitted with a move back: its pages and slots are its own at once, its first step waits for the bytes.
//   take_moves  once per plan, after it: the moves to start, in order.
//   moved       a move is done. Every move that was taken must be, whatever became of what it moved.
//   - A move out pins nothing on the device. When its unit changes before it is done it is void: what it wrote is of
//     no use, and what it writes to returns when it is done.
//   - A move in pins its source. Its sequence may not be committed, forked, finished or aborted until it is done.
//   - Whether a move back is sooner than computing is decided by `Costs`, beside the moves that are under way.
//
// WHAT STAYS TRUE (check() verifies all of it)
//   Resident nodes have resident parents, on the device and in host memory alike. A snapshot's pages are resident where
//   its slot is; host pages are there for host snapshots alone. Reference counts equal the references
//   found by walking. Eviction takes the deepest pages first. Equal calls on equal instances give equal answers.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "pools.h"
#include "snapshots.h"
#include "tree.h"

namespace tokenspeed::cache {

using RequestId = int64_t;

struct Config {
    int32_t pages = 0;
    int32_t slots = 0;
    int32_t host_pages = 0;  // of the host tier; none without host slots
    int32_t host_slots = 0;
    int32_t page_tokens = 64;  // 2 to 128
    int32_t ghost_nodes = 0;   // evicted pages whose token ids are remembered
    int32_t grid_tokens = 0;   // distance of grid snapshots in long prefills; 0: none
    Policy policy = Policy::kValue;
    bool branch_points = true;  // snapshot where a prompt leaves what is known
    bool enabled = true;        // false: pages and slots are allotted, nothing is shared or remembered
};

// Why a prompt resumes where it does and not later.
enum class Reason : uint8_t {
    kCold,              // nothing in this namespace begins like this prompt
    kNewTokens,         // everything known was reused; the rest is new
    kWholePromptKnown,  // everything is known, but one token must be computed to give logits
    kNoSnapshot,        // tokens beyond are known, but no state was kept there
    kComputedSooner,    // a state beyond is in host memory, or on its way back, but computing is sooner
    kSnapshotEvicted,   // a state beyond was evicted, or not kept, for want of a slot
    kPending,           // a running sequence is about to write a state beyond
    kPromptLogprobs,    // the caller needs logits of every prompt token
    kTightMemory,       // a state was kept, but an empty machine has no room to use it and keep it
    kDisabled,          // the cache is off
};

struct Match {
    int32_t known_tokens = 0;  // longest prefix seen before, evicted or not: the divergence position
    int32_t kv_tokens = 0;     // keys and values below are shared; >= state_tokens
    int32_t state_tokens = 0;  // compute resumes here (`cached_tokens`)
    int32_t moved_tokens = 0;  // of state_tokens, those behind the deepest state on the device: a move brings them back
    int32_t pending_tokens =
        0;  // a snapshot that will be published, beyond state_tokens, or there instead of a move; 0: none
    Reason reason = Reason::kCold;
};

struct Copy {
    PageId source, target;
    int32_t rows;  // rows [0, rows) of every layer
};

struct PromisedSnapshot {
    int32_t tokens;
    SlotId slot;
};

struct Admission {
    Match match;
    std::vector<PageId> pages;  // in token order; cover at least prompt + 1 tokens
    SlotId read_slot = -1;      // first step only; -1 when it starts from nothing (match.state_tokens == 0)
    SlotId write_slot = -1;     // the working slot, read and written in place from the second step on
    std::vector<Copy> copies;   // before anything is stored
    std::vector<PromisedSnapshot> snapshots;  // ascending, in (state_tokens, prompt]
    int64_t move = 0;                         // that must be done before the first step; 0: none
};

// Bytes to copy between the device and host memory: whole pages, as (source, target), and one slot.
struct Move {
    int64_t id;
    bool out;  // to host memory
    std::vector<std::pair<PageId, PageId>> pages;
    SlotId source, target;
};

// Seconds: to move a page, to move a slot, to compute a token. Measured by whoever runs the device.
struct Costs {
    double page = 0, slot = 0, token = 1;
};

// Where the bytes of a prefix go. Tokens below `kv_tokens` (whole pages) are there already, and must not be written.
struct Reception {
    int32_t kv_tokens = 0;
    std::vector<PageId> pages;  // in token order; cover the prefix
    SlotId slot = -1;           // the state after all of it
};

// What is there of a prefix. It stays as it is until it is released.
struct Loan {
    int32_t kv_tokens = 0;      // keys and values; >= state_tokens
    int32_t state_tokens = 0;   // the deepest state; 0: none
    std::vector<PageId> pages;  // in token order; cover kv_tokens
    SlotId slot = -1;           // that state; -1: none
};

struct Fork {
    Admission child;
    SlotId parent_read = -1, parent_write = -1;  // the parent's slots from the next step on
};

// Not now: some sequence must give way first. The numbers say what is missing after every possible eviction.
struct NoRoom {
    int32_t pages_short = 0;
    int32_t slots_short = 0;
};

// The call is wrong, whatever the load.
enum class Error : uint8_t {
    kUnknownRequest,
    kDuplicateRequest,
    kEmptyPrompt,
    kTooLarge,       // does not fit an empty cache
    kBeyondPages,    // count exceeds the pages the sequence holds
    kTokensMissing,  // count exceeds the tokens passed
    kBackwards,      // count is below what is committed
    kMoving,         // its move back is not done
    kUnknownMove,    // none of this number is under way
    kDisabled,       // the cache is off: it neither receives nor lends
};

template <class T>
using Result = std::variant<T, NoRoom, Error>;
struct Done {};

// What became of a whole page of tokens, for whoever routes prompts to where their prefix is. A block is named by its
// node until it is let go; then the name may come again. Parents come before their children, and go after them.
struct Event {
    enum class Kind : uint8_t { kStored, kRemoved, kCleared };
    Kind kind;                  // kCleared: forget every block; those that are there follow
    NodeId block = kNoNode;     // not for kCleared
    NodeId parent = kNoNode;    // of a stored block; kNoNode for the first of its prompt
    std::string name_space;     // of a stored block without a parent
    std::vector<Token> tokens;  // of a stored block: page_tokens of them
};

struct Stats {
    // Counters since construction.
    int64_t admissions = 0, no_room = 0, forks = 0, finished = 0, aborted = 0;
    int64_t prompt_tokens = 0, cached_tokens = 0;  // cached: resumed from a snapshot
    int64_t known_tokens = 0;                      // ideal: would have resumed with a snapshot everywhere
    int64_t kv_matched_tokens = 0;                 // of the known tokens, those with resident keys and values
    int64_t recomputed_matched_tokens = 0;         // resident but computed again, for want of a state
    int64_t snapshots_promised = 0, snapshots_declined = 0, snapshots_published = 0, snapshots_donated = 0;
    int64_t snapshots_redundant = 0, snapshots_evicted = 0, snapshots_consumed = 0, snapshot_hits = 0;
    int64_t received = 0, received_tokens = 0, lent = 0;         // tokens: those that were not there
    int64_t moved_out = 0, moved_out_pages = 0, moves_void = 0;  // units copied to host memory; those of no use
    int64_t moved_in = 0, moved_in_pages = 0, moved_in_tokens = 0;
    int64_t host_evicted = 0, snapshots_left_to_host = 0;  // of snapshots_evicted, those that host memory still has
    int64_t pages_evicted = 0, ghosts_dropped = 0, page_copies = 0, pages_appended_in_place = 0;
    // Now.
    int64_t pages_free = 0, pages_held = 0, pages_evictable = 0;  // sum to Config::pages
    int64_t slots_free = 0, slots_working = 0, slots_promised = 0, slots_snapshot = 0, slots_draining = 0;
    int64_t host_pages_free = 0, host_slots_free = 0, moves_under_way = 0;
    int64_t running = 0, pinned = 0, nodes = 0, ghosts = 0, namespaces = 0;
    double usual_reuse_time = 0;    // admissions between uses of a snapshot, weighted by tokens saved
    double superseded_weight = 0;   // how likely a passed snapshot is used again, to how likely a fresh one is
    int64_t bookkeeping_bytes = 0;  // beside token ids
    int64_t token_bytes = 0;        // token ids of nodes
};

class Cache {
  public:
    using Tokens = std::span<const Token>;

    // Null when the configuration is impossible.
    static std::unique_ptr<Cache> create(const Config& config);

    Match probe(std::string_view name_space, Tokens prompt, bool prompt_logprobs = false) const;
    Result<Admission> admit(RequestId id, std::string_view name_space, Tokens prompt,
                            std::span<const int32_t> boundaries, bool prompt_logprobs = false);
    // The pages appended; empty when there was room already.
    Result<std::span<const PageId>> extend(RequestId id, int32_t count);
    Result<Done> commit(RequestId id, Tokens tokens, int32_t count);
    Result<Fork> fork(RequestId parent, RequestId child, Tokens tokens, int32_t count);
    Result<Done> finish(RequestId id, Tokens tokens, int32_t count, bool donate = true);
    Result<Done> abort(RequestId id);

    // Ids of receptions and loans are those of sequences: one name is one thing. `tokens` is the prefix, no more.
    Result<Reception> receive(RequestId id, std::string_view name_space, Tokens tokens);
    Result<Done> received(RequestId id);
    Result<Loan> lend(RequestId id, std::string_view name_space, Tokens tokens);
    Result<Done> release(RequestId id);

    std::vector<Move> take_moves();
    Result<Done> moved(int64_t move);
    void set_costs(const Costs& costs) { costs_ = costs; }

    // True if the namespace existed.
    bool clear(std::string_view name_space);
    // The same for every namespace. How many there were.
    int64_t clear_all();

    // Keeps a log of blocks that become matchable or are let go, of at most `entries` events; 0 stops it. A log that
    // overflows starts over: the next drain says kCleared and then what is there.
    void log_events(int32_t entries);
    // The events since the last drain, oldest first.
    std::vector<Event> drain_events();

    Stats stats() const;
    const Config& config() const { return config_; }
    // The first broken invariant in words; empty when all hold. Cost: everything.
    std::string check() const;

  private:
    struct Promised {
        int32_t tokens;
        NodeId node;  // kNoNode when the cache is off
        Kind kind;
        SlotRef slot;
    };
    enum class Role : uint8_t { kSequence, kReception, kPin };
    struct Request {
        Role role = Role::kSequence;
        NodeId root = kNoNode;
        std::vector<NodeId> path;  // full-page nodes of its tokens; the last one (or the root) is kept
        int32_t published = 0;     // leading nodes of `path` that are resident; the last one (or the root) is locked
        int32_t duplicates = 0;    // of these, nodes whose page was another's when this sequence came
        int32_t committed = 0;
        int32_t resume = 0;
        uint32_t admission = 0;          // its number
        std::vector<PageId> pages;       // one reference and one hold each
        int32_t writes_from = 0;         // index of the first page it may store into
        SlotRef working;                 // of a sequence
        std::vector<Promised> promised;  // ascending
        NodeId source = kNoNode;         // snapshot node it resumes from: locked until the first commit
        SlotRef source_slot;             // pinned for as long
        PageId source_page = -1;         // page a fork copies from, held for as long
        int64_t move = 0;                // brings back what it resumes from; 0: none, or it is done
        double move_seconds = 0;
        NodeId host_source = kNoNode;  // what it brings back, for as long
        SlotRef host_slot;
    };
    struct Walk {
        Match match;
        NodeId snapshot = kNoNode;  // the node compute resumes from
        NodeId host = kNoNode;      // a deeper one in host memory, to be moved back
        NodeId lost = kNoNode;      // a deeper one whose snapshot was let go
        int32_t full = 0;           // full nodes on the path
        int32_t shared = 0;         // of which resident and below the cap
    };
    struct Victim {
        NodeId node;
        double score;
    };
    struct Room {
        std::optional<NoRoom> missing;
        PageId partial = -1;   // page that holds the first rows of the one compute resumes in
        bool append = false;   // it is taken over; else it is copied
        bool consume = false;  // the working slot is the snapshot's own
    };
    enum class Resource { kPages, kSlots };

    explicit Cache(const Config& config);

    // match.cpp
    struct Search {
        int32_t cap;         // compute resumes there at the latest
        bool states = true;  // false: nowhere, every token is computed
        bool host = true;    // also from host memory
    };
    Walk walk(NodeId root, Tokens prompt, Search search, std::vector<NodeId>* path) const;

    // admit.cpp
    Room reserve(Request& request, const Walk& found, int32_t total);
    void bring_back(Request& request, Admission& admission, const Walk& found);
    void promise_snapshots(Request& request, Tokens prompt, std::span<const int32_t> boundaries, const Walk& found);
    std::optional<SlotRef> optional_slot(int32_t gain, Kind kind);

    // tiers.cpp
    struct Outgoing {
        int64_t id;
        NodeId node;  // of the snapshot; kNoNode: void
        NodeId base;  // the deepest node above that is in host memory already
        std::vector<NodeId> nodes;
        std::vector<PageId> pages;  // beside `nodes`: where they go
        SlotRef slot;
    };
    void host_use(NodeId node);
    void host_drop(NodeId node);
    void save_ahead();
    bool scarce() const;
    std::optional<NodeId> weakest_unsaved() const;
    const Snapshots::Record* weakest_on_host() const;
    bool save(NodeId node);
    bool make_host_room(const Snapshots::Record& record, int32_t pages);
    void evict_host(NodeId node);
    void make_void(Snapshots::Record& record);
    void void_moves_of(NodeId node);
    SlotRef take_state(NodeId node);
    void forget_snapshot(NodeId node);
    double seconds_to_move(int32_t pages) const { return pages * costs_.page + costs_.slot; }
    double seconds_under_way() const;
    double loss(const Snapshots::Record& record) const;
    void arrived(Request& request);

    // transfer.cpp
    std::optional<Error> validate_transfer(RequestId id, Tokens tokens) const;

    // requests.cpp
    std::map<RequestId, Request>::iterator find_sequence(RequestId id);
    NodeId root_of(std::string_view name_space);
    void take_page(Request& request);
    void grow_path(Request& request, Tokens tokens, int32_t full_pages);
    NodeId node_before(const Request& request, int32_t count) const;
    NodeId find_snapshot_node(const Request& request, Tokens tokens, int32_t count) const;
    NodeId snapshot_node(Request& request, Tokens tokens, int32_t count);
    void add_promise(Request& request, int32_t tokens, NodeId node, Kind kind, SlotRef slot);
    void drop_promise(const Promised& promised);
    std::optional<Error> validate(RequestId id, Tokens tokens, int32_t count) const;
    void publish(Request& request, Tokens tokens, int32_t count);
    NodeId locked_node(const Request& request) const;
    NodeId kept_node(const Request& request) const;
    void publish_snapshot(Request& request, NodeId node, SlotRef slot, Kind kind, int64_t& counter);
    void release_source(Request& request);
    void release(std::map<RequestId, Request>::iterator it);

    // evict.cpp
    std::optional<NoRoom> make_room(int32_t pages, int32_t slots);
    NoRoom missing(int32_t pages, int32_t slots) const;
    void drop_duplicates();
    void evict_one(Resource resource);
    std::optional<Victim> weakest(Resource resource) const;
    bool evictable(const Snapshots::Record& record, Resource resource) const;
    int32_t evictable_slots() const;
    void evict_idle();
    void evict_snapshot(NodeId node);
    void make_resident(NodeId node, PageId page);
    void make_ghost(NodeId node);
    void trim_ghosts();
    void erase(NodeId node);
    void lock(NodeId node);
    void unlock(NodeId node);
    void keep(NodeId node);
    void unkeep(NodeId node);
    void refresh(NodeId node);
    void purge(NodeId root);
    void forget_if_empty(NodeId root);
    void forget(NodeId root);

    // events.cpp
    void announce(NodeId node, NodeId root);
    void withdraw(NodeId node);
    void log(Event event);
    Event stored(NodeId node, NodeId root) const;

    int32_t pages_for(int32_t tokens) const {
        return tokens / config_.page_tokens + (tokens % config_.page_tokens != 0);
    }

    Config config_;
    Tree tree_;
    PagePool pages_;
    SlotPool slots_;  // before whatever holds a SlotRef
    PagePool host_pages_;
    SlotPool host_slots_;
    Snapshots snapshots_;
    NodeList idle_, ghosts_;  // idle: unlocked resident nodes that no snapshot needs, deepest first
    std::map<std::string, NodeId, std::less<>> roots_;
    std::map<RequestId, Request> requests_;
    Costs costs_;
    std::vector<Outgoing> outgoing_;  // in the order in which they were taken
    std::vector<Move> moves_;         // to be taken
    int64_t last_move_ = 0;
    int32_t promised_ = 0;  // slots promised to snapshots that are not written yet
    Stats counters_;
    int32_t max_events_ = 0;  // 0: no log is kept
    bool events_lost_ = false;
    std::vector<Event> events_;
};

}  // namespace tokenspeed::cache
