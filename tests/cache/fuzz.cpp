// Random calls against the cache beside a simulated device: every KV row and every slot holds the identity of the
// prefix it was computed from. A hit on anything else, a store into rows that someone still refers to, a slot with two
// owners, a leak, or an invariant that check() finds broken ends the run with the seed that repeats it.
//
//   fuzz OPERATIONS [SEED]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "cache.h"

using namespace tokenspeed::cache;

namespace {

uint64_t episode_seed = 0;
int64_t operation = 0;

#define REQUIRE(condition, ...)                                                                                 \
    do {                                                                                                        \
        if (!(condition)) {                                                                                     \
            std::fprintf(stderr, "FAILED %s:%d: %s\n  episode seed %llu, operation %lld: ", __FILE__, __LINE__, \
                         #condition, static_cast<unsigned long long>(episode_seed),                             \
                         static_cast<long long>(operation));                                                    \
            std::fprintf(stderr, __VA_ARGS__);                                                                  \
            std::fprintf(stderr, "\n");                                                                         \
            std::exit(1);                                                                                       \
        }                                                                                                       \
    } while (0)

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    int32_t below(int32_t n) { return static_cast<int32_t>(next() % static_cast<uint64_t>(n)); }
    bool chance(int32_t percent) { return below(100) < percent; }
};

uint64_t extend_identity(uint64_t prefix, Token token) {
    return Random{prefix ^ (static_cast<uint64_t>(static_cast<uint32_t>(token)) + 1) * 0xd6e8feb86659fd93}.next();
}

struct Sequence {
    RequestId id;
    int name_space;
    std::vector<Token> tokens;
    std::vector<uint64_t> identity;  // [tokens + 1], of each prefix
    int32_t prompt = 0, launched = 0, committed = 0, resume = 0, kv = 0;
    int64_t move = 0;      // under way, of what it resumes from
    bool cleared = false;  // its namespace was: it leaves nothing
    std::vector<PageId> pages;
    SlotId read = -1, write = -1;
    std::vector<PromisedSnapshot> promised;

    void push(Token token) {
        if (identity.empty()) identity.push_back(extend_identity(77, name_space));
        tokens.push_back(token);
        identity.push_back(extend_identity(identity.back(), token));
    }
};

// A prefix that comes from elsewhere, or is lent.
struct Transfer : Sequence {
    bool arrives = false;  // its bytes are on their way
    int32_t state = 0;     // tokens of the state that is there
    SlotId slot = -1;
};

const char* const kNames[] = {"", "a", "longer-name-space"};

bool same(const Match& a, const Match& b) {
    return a.known_tokens == b.known_tokens && a.kv_tokens == b.kv_tokens && a.state_tokens == b.state_tokens &&
           a.moved_tokens == b.moved_tokens && a.pending_tokens == b.pending_tokens && a.reason == b.reason;
}

bool same(const Admission& a, const Admission& b) {
    auto copies = [](const Copy& x, const Copy& y) {
        return x.source == y.source && x.target == y.target && x.rows == y.rows;
    };
    auto snapshots = [](const PromisedSnapshot& x, const PromisedSnapshot& y) {
        return x.tokens == y.tokens && x.slot == y.slot;
    };
    return same(a.match, b.match) && a.pages == b.pages && a.read_slot == b.read_slot && a.write_slot == b.write_slot &&
           a.move == b.move && std::ranges::equal(a.copies, b.copies, copies) &&
           std::ranges::equal(a.snapshots, b.snapshots, snapshots);
}

class Episode {
  public:
    explicit Episode(uint64_t seed) : random_{seed} {
        config_.page_tokens = 2 + random_.below(7);
        config_.pages = random_.chance(5) ? random_.below(2) : 2 + random_.below(48);
        config_.slots = random_.chance(5) ? random_.below(2) : 1 + random_.below(10);
        if (random_.chance(60)) {
            config_.host_slots = 1 + random_.below(8);
            config_.host_pages = random_.below(60);
        }
        config_.ghost_nodes = random_.chance(30) ? 0 : random_.below(40);
        config_.grid_tokens = random_.chance(30) ? 1 + random_.below(20) : 0;
        config_.policy = random_.chance(30) ? Policy::kLru : Policy::kValue;
        config_.branch_points = random_.chance(80);
        config_.enabled = !random_.chance(5);
        cache_ = Cache::create(config_);
        REQUIRE(cache_ != nullptr, "configuration refused");
        if (random_.chance(25)) twin_ = Cache::create(config_);
        if (random_.chance(50)) {
            Costs costs{random_.below(9) * 1.0, random_.below(9) * 1.0, random_.below(9) * 0.5};
            cache_->set_costs(costs);
            if (twin_) twin_->set_costs(costs);
        }
        // Decided by the seed, so that episodes stay what they were; the twin keeps none: a log changes nothing.
        if (seed % 2 == 1) cache_->log_events(static_cast<int32_t>(1 + seed / 2 % 100));
        rows_.assign(config_.pages, std::vector<uint64_t>(config_.page_tokens, 0));
        slots_.assign(config_.slots, 0);
        host_rows_.assign(config_.host_pages, rows_.empty() ? std::vector<uint64_t>(config_.page_tokens) : rows_[0]);
        host_slots_.assign(config_.host_slots, 0);
        alphabet_ = 1 + random_.below(3);
    }

    void run(int32_t operations) {
        for (int32_t i = 0; i < operations; ++i, ++operation) {
            act();
            if (random_.chance(30)) take_moves();
            if (!flights_.empty() && random_.chance(40))
                fly(random_.below(static_cast<int32_t>(flights_.size())), random_.chance(40));
            if (random_.chance(6)) check();
        }
        take_moves();
        while (!flights_.empty()) fly(random_.below(static_cast<int32_t>(flights_.size())), true);
        while (!transfers_.empty()) end_transfer(random_.below(static_cast<int32_t>(transfers_.size())));
        while (!running_.empty()) end(random_.below(static_cast<int32_t>(running_.size())), random_.chance(50));
        check();
        Stats stats = cache_->stats();
        REQUIRE(
            stats.pages_held == 0 && stats.slots_working == 0 && stats.slots_promised == 0 && stats.slots_draining == 0,
            "leak: %lld pages, %lld draining slots", static_cast<long long>(stats.pages_held),
            static_cast<long long>(stats.slots_draining));
        take_moves();
        clear_all();  // what is under way is void
        while (!flights_.empty()) fly(0, true);
        check();
        stats = cache_->stats();
        REQUIRE(stats.pages_free == config_.pages && stats.slots_free == config_.slots && stats.nodes == 0 &&
                    stats.host_pages_free == config_.host_pages && stats.host_slots_free == config_.host_slots,
                "something survived clear: %lld nodes", static_cast<long long>(stats.nodes));
        REQUIRE(blocks_.empty(), "%zu blocks were never said to be gone", blocks_.size());
        hits += stats.snapshot_hits, copies += stats.page_copies, appended += stats.pages_appended_in_place;
        evicted += stats.snapshots_evicted, no_room += stats.no_room, consumed += stats.snapshots_consumed;
        forks += stats.forks, received += stats.received, lent += stats.lent;
        moved_in += stats.moved_in, moved_out += stats.moved_out, moves_void += stats.moves_void;
        host_evicted += stats.host_evicted;
    }

    static inline int64_t hits = 0, copies = 0, appended = 0, evicted = 0, no_room = 0, consumed = 0, forks = 0;
    static inline int64_t received = 0, lent = 0, moved_in = 0, moved_out = 0, moves_void = 0, host_evicted = 0;

  private:
    // The log as a listener sees it: blocks and how many children each has.
    void replay_events() {
        for (const Event& event : cache_->drain_events()) {
            auto known = blocks_.find(event.block);
            switch (event.kind) {
                case Event::Kind::kCleared:
                    blocks_.clear();
                    break;
                case Event::Kind::kStored:
                    REQUIRE(known == blocks_.end(), "block %u is stored twice", event.block);
                    REQUIRE(static_cast<int32_t>(event.tokens.size()) == config_.page_tokens, "a block of %zu tokens",
                            event.tokens.size());
                    if (event.parent != kNoNode) {
                        REQUIRE(blocks_.contains(event.parent), "block %u before its parent", event.block);
                        ++blocks_[event.parent].second;
                    }
                    blocks_[event.block] = {event.parent, 0};
                    break;
                default:
                    REQUIRE(known != blocks_.end(), "block %u goes, but never came", event.block);
                    REQUIRE(known->second.second == 0, "block %u goes before its children", event.block);
                    if (known->second.first != kNoNode) --blocks_[known->second.first].second;
                    blocks_.erase(known);
            }
        }
    }

    void check() {
        std::string broken = cache_->check();
        REQUIRE(broken.empty(), "%s", broken.c_str());
        replay_events();
    }

    void act() {
        if (random_.chance(8)) return transfer();
        int32_t dice = random_.below(100);
        if (running_.empty() || dice < 12) return admit();
        int32_t which = random_.below(static_cast<int32_t>(running_.size()));
        if (running_[which].move != 0) return await(running_[which]);
        if (dice < 55) return launch(running_[which]);
        if (dice < 80) return commit(running_[which]);
        if (dice < 90) return end(which, dice < 87);
        if (dice < 97) return fork(which);
        if (dice < 99) return misuse(running_[which]);
        if (random_.chance(30)) return clear_all();
        clear(random_.below(3));
    }

    // A prompt is often the beginning of something seen before, with a new end.
    std::vector<Token> prompt() {
        std::vector<Token> tokens;
        if (!history_.empty() && random_.chance(75)) {
            const auto& old = history_[random_.below(static_cast<int32_t>(history_.size()))];
            auto keep = random_.chance(60) ? old.size()
                                           : static_cast<size_t>(random_.below(static_cast<int32_t>(old.size()) + 1));
            tokens.assign(old.begin(), old.begin() + keep);
        }
        for (int32_t extra = random_.below(3 * config_.page_tokens); extra > 0; --extra)
            tokens.push_back(random_.below(alphabet_));
        if (tokens.size() > static_cast<size_t>(12 * config_.page_tokens)) tokens.resize(12 * config_.page_tokens);
        return tokens;
    }

    int32_t pages_held() const {
        std::set<PageId> held;
        for (const Sequence& sequence : running_) held.insert(sequence.pages.begin(), sequence.pages.end());
        auto pinned = static_cast<int32_t>(held.size());
        // A loan's state may lie in a page of its own.
        for (const Transfer& transfer : transfers_) pinned += static_cast<int32_t>(transfer.pages.size()) + 1;
        return pinned;
    }

    void admit() {
        Sequence sequence;
        sequence.id = random_.chance(3) && !running_.empty() ? running_[0].id : next_id_++;
        sequence.name_space = random_.chance(80) ? 0 : random_.below(3);
        for (Token token : prompt()) sequence.push(token);
        sequence.prompt = static_cast<int32_t>(sequence.tokens.size());
        std::vector<int32_t> boundaries;
        for (int32_t n = random_.below(4); n > 0; --n) boundaries.push_back(random_.below(sequence.prompt + 3) - 1);
        const bool logprobs = random_.chance(5);
        const char* name = kNames[sequence.name_space];
        Match probed = cache_->probe(name, sequence.tokens, logprobs);
        auto result = cache_->admit(sequence.id, name, sequence.tokens, boundaries, logprobs);
        if (twin_) {
            auto other = twin_->admit(sequence.id, name, sequence.tokens, boundaries, logprobs);
            REQUIRE(result.index() == other.index(), "the twin answers differently");
            if (result.index() == 0)
                REQUIRE(same(std::get<Admission>(result), std::get<Admission>(other)), "the twin admits differently");
        }
        const int32_t needed = sequence.prompt / config_.page_tokens + 1;
        if (auto* error = std::get_if<Error>(&result)) {
            bool duplicate = std::ranges::any_of(running_, [&](const auto& other) { return other.id == sequence.id; });
            bool large = needed > config_.pages || config_.slots == 0;
            REQUIRE(*error == (duplicate              ? Error::kDuplicateRequest
                               : sequence.prompt == 0 ? Error::kEmptyPrompt
                                                      : Error::kTooLarge) &&
                        (duplicate || sequence.prompt == 0 || large),
                    "error %d for a prompt of %d", static_cast<int>(*error), sequence.prompt);
            return;
        }
        if (auto* missing = std::get_if<NoRoom>(&result)) {
            REQUIRE(!running_.empty() || !transfers_.empty(), "no room in a cache that nobody uses");
            // With nothing shared at all this prompt would take `needed` pages. Beside those of running sequences, the
            // page that a sequence (or this prompt) resumes in is pinned until its first commit.
            auto pinned =
                std::ranges::count_if(running_, [](const auto& other) { return other.committed == other.resume; });
            REQUIRE(missing->slots_short > 0 || needed > config_.pages - pages_held() - pinned - 1, "it fits");
            return;
        }
        const Admission& admission = std::get<Admission>(result);
        REQUIRE(same(probed, admission.match) ||
                    (running_.empty() && transfers_.empty() && admission.match.reason == Reason::kTightMemory),
                "probe and admit differ");
        const Match& match = admission.match;
        REQUIRE(match.state_tokens < sequence.prompt && match.state_tokens <= match.kv_tokens &&
                    match.kv_tokens < sequence.prompt && match.kv_tokens <= match.known_tokens,
                "state %d kv %d known %d of %d", match.state_tokens, match.kv_tokens, match.known_tokens,
                sequence.prompt);
        REQUIRE(!logprobs || match.state_tokens == 0, "prompt logprobs resumed");
        accept(sequence, admission);
        REQUIRE((match.moved_tokens > 0) == (admission.move != 0), "%d tokens without a move", match.moved_tokens);
        if (admission.move == 0) prefix_is_there(sequence, match.kv_tokens);
        running_.push_back(std::move(sequence));
    }

    void accept(Sequence& sequence, const Admission& admission) {
        sequence.pages = admission.pages;
        sequence.promised = admission.snapshots;
        sequence.read = admission.read_slot;
        sequence.write = admission.write_slot;
        sequence.resume = sequence.launched = sequence.committed = admission.match.state_tokens;
        sequence.kv = admission.match.kv_tokens;
        REQUIRE(static_cast<int32_t>(sequence.pages.size()) == sequence.prompt / config_.page_tokens + 1, "page count");
        REQUIRE((sequence.read < 0) == (sequence.resume == 0), "read slot %d at %d", sequence.read, sequence.resume);
        for (const Copy& copy : admission.copies) {
            REQUIRE(copy.source != copy.target, "copy onto itself");
            std::copy_n(rows_[copy.source].begin(), copy.rows, rows_[copy.target].begin());
        }
        sequence.move = admission.move;
        if (sequence.read >= 0 && sequence.move == 0)
            REQUIRE(slots_[sequence.read] == sequence.identity[sequence.resume], "the state is another prefix's");
        own(sequence.write, sequence);
        int32_t previous = sequence.resume;
        for (const auto& promised : sequence.promised) {
            REQUIRE(promised.tokens > previous && promised.tokens <= sequence.prompt, "promised at %d",
                    promised.tokens);
            previous = promised.tokens;
            own(promised.slot, sequence);
        }
    }

    void prefix_is_there(const Sequence& sequence, int32_t count) {
        for (int32_t i = 0; i < count; ++i)
            REQUIRE(row(sequence, i) == sequence.identity[i + 1], "row %d is another prefix's", i);
    }

    // The copies, as a device makes them: piece by piece, at any time until the move is done.
    struct Flight {
        Move move;
        size_t copied = 0;
    };

    void take_moves() {
        auto moves = cache_->take_moves();
        if (twin_) REQUIRE(twin_->take_moves().size() == moves.size(), "the twin moves something else");
        for (Move& move : moves) flights_.push_back({std::move(move)});
    }

    void fly(int32_t which, bool all) {
        Flight& flight = flights_[which];
        const Move& move = flight.move;
        auto& from = move.out ? rows_ : host_rows_;
        auto& to = move.out ? host_rows_ : rows_;
        while (flight.copied <= move.pages.size() && (all || random_.chance(60))) {
            const size_t at = flight.copied++;
            if (at < move.pages.size())
                to[move.pages[at].second] = from[move.pages[at].first];
            else
                (move.out ? host_slots_ : slots_)[move.target] = (move.out ? slots_ : host_slots_)[move.source];
        }
        if (!all) return;
        const int64_t id = move.id;
        flights_.erase(flights_.begin() + which);
        REQUIRE(cache_->moved(id).index() == 0 && cache_->moved(id).index() == 2, "moved");
        if (twin_) twin_->moved(id);
        for (Sequence& sequence : running_) {
            if (sequence.move != id) continue;
            sequence.move = 0;
            prefix_is_there(sequence, sequence.resume);
            REQUIRE(slots_[sequence.read] == sequence.identity[sequence.resume], "a state came back as another's");
            found(sequence, sequence.resume, 0);
        }
    }

    // Nothing may be done with a sequence before what it resumes from is there.
    void await(const Sequence& sequence) {
        auto moving = [](const auto& result) {
            return std::holds_alternative<Error>(result) && std::get<Error>(result) == Error::kMoving;
        };
        REQUIRE(moving(cache_->abort(sequence.id)) && moving(cache_->commit(sequence.id, sequence.tokens, 0)),
                "moving");
        take_moves();
        const int64_t id = sequence.move;
        auto flight = std::ranges::find_if(flights_, [&](const Flight& other) { return other.move.id == id; });
        REQUIRE(flight != flights_.end(), "move %lld was never taken", static_cast<long long>(id));
        if (random_.chance(50)) fly(static_cast<int32_t>(flight - flights_.begin()), true);
    }

    // No other running sequence writes this slot.
    void own(SlotId slot, const Sequence& owner) {
        for (const Sequence& other : running_) {
            if (other.id == owner.id) continue;
            bool reads = other.read == slot && other.launched == other.resume && other.read != other.write;
            bool promises =
                std::ranges::any_of(other.promised, [&](const auto& promised) { return promised.slot == slot; });
            REQUIRE(other.write != slot && !promises && !reads, "slot %d has two owners", slot);
        }
        for (const Transfer& other : transfers_)
            REQUIRE(other.id == owner.id || other.slot != slot, "slot %d is a transfer's", slot);
    }

    uint64_t& row(const Sequence& sequence, int32_t token) {
        return rows_[sequence.pages[token / config_.page_tokens]][token % config_.page_tokens];
    }

    void transfer() {
        if (!transfers_.empty() && random_.chance(60)) {
            int32_t which = random_.below(static_cast<int32_t>(transfers_.size()));
            Transfer& open = transfers_[which];
            if (!open.arrives || random_.chance(30)) return end_transfer(which);
            bring(open, random_.chance(60));
            return;
        }
        Transfer made;
        made.id = random_.chance(3) && !running_.empty() ? running_[0].id : next_id_++;
        made.name_space = random_.chance(80) ? 0 : random_.below(3);
        for (Token token : prompt()) made.push(token);
        made.prompt = static_cast<int32_t>(made.tokens.size());
        made.arrives = random_.chance(50);
        const char* name = kNames[made.name_space];
        auto error = [&](Error error) {
            bool duplicate = std::ranges::any_of(running_, [&](const auto& other) { return other.id == made.id; });
            REQUIRE(error == (!config_.enabled   ? Error::kDisabled
                              : duplicate        ? Error::kDuplicateRequest
                              : made.prompt == 0 ? Error::kEmptyPrompt
                                                 : Error::kTooLarge),
                    "error %d for a transfer of %d", static_cast<int>(error), made.prompt);
        };
        if (made.arrives) {
            auto result = cache_->receive(made.id, name, made.tokens);
            if (twin_) REQUIRE(twin_->receive(made.id, name, made.tokens).index() == result.index(), "twin");
            if (auto* wrong = std::get_if<Error>(&result)) return error(*wrong);
            if (std::holds_alternative<NoRoom>(result)) {
                REQUIRE(!running_.empty() || !transfers_.empty(), "no room in a cache that nobody uses");
                return;
            }
            const auto& where = std::get<Reception>(result);
            made.kv = where.kv_tokens, made.pages = where.pages, made.slot = where.slot;
            REQUIRE(static_cast<int32_t>(made.pages.size()) * config_.page_tokens >= made.prompt, "pages are missing");
            REQUIRE(cache_->commit(made.id, made.tokens, 0).index() == 2, "a reception is no sequence");
            own(made.slot, made);
            bring(made, false);
        } else {
            auto result = cache_->lend(made.id, name, made.tokens);
            if (twin_) REQUIRE(twin_->lend(made.id, name, made.tokens).index() == result.index(), "twin");
            if (auto* wrong = std::get_if<Error>(&result)) return error(*wrong);
            const auto& loan = std::get<Loan>(result);
            made.kv = loan.kv_tokens, made.state = loan.state_tokens, made.pages = loan.pages, made.slot = loan.slot;
            lend_is_whole(made);
        }
        transfers_.push_back(std::move(made));
    }

    // Bytes come in any order: rubbish first, and what is right at the end.
    void bring(Transfer& transfer, bool all) {
        for (int32_t i = 0; i < transfer.prompt; ++i) {
            if (i < transfer.kv)
                REQUIRE(row(transfer, i) == transfer.identity[i + 1], "row %d changed under a reception", i);
            else
                row(transfer, i) = all ? transfer.identity[i + 1] : random_.next();
        }
        slots_[transfer.slot] = all ? transfer.identity[transfer.prompt] : random_.next();
        if (!all) return;
        REQUIRE(cache_->received(transfer.id).index() == 0, "received");
        if (twin_) twin_->received(transfer.id);
        transfer.arrives = false;
        transfer.slot = -1;  // the tree's now
        transfer.state = transfer.prompt;
        found(transfer, transfer.prompt, transfer.prompt);
    }

    void lend_is_whole(const Transfer& loan) {
        if (loan.slot < 0) return;
        REQUIRE(slots_[loan.slot] == loan.identity[loan.state], "a state changed while it was lent");
        for (int32_t i = 0; i < loan.kv; ++i)
            REQUIRE(row(loan, i) == loan.identity[i + 1], "row %d changed while it was lent", i);
    }

    void end_transfer(int32_t which) {
        Transfer& transfer = transfers_[which];
        if (!transfer.arrives) lend_is_whole(transfer);
        if (!transfer.arrives && transfer.slot < 0) found(transfer, 0, transfer.state);  // received: it is still there
        REQUIRE(cache_->abort(transfer.id).index() == 2, "a transfer is no sequence");
        REQUIRE(cache_->release(transfer.id).index() == 0 && cache_->release(transfer.id).index() == 2, "release");
        if (twin_) twin_->release(transfer.id);
        transfers_.erase(transfers_.begin() + which);
    }

    // One step of one sequence: some more of the prompt, or one token.
    void launch(Sequence& sequence) {
        int32_t count = 1;
        if (sequence.launched < sequence.prompt) {
            count = 1 + random_.below(std::min(sequence.prompt - sequence.launched, 2 * config_.page_tokens));
        } else {
            auto grown = cache_->extend(sequence.id, sequence.launched + 1);
            if (twin_) REQUIRE(twin_->extend(sequence.id, sequence.launched + 1).index() == grown.index(), "twin");
            if (std::holds_alternative<NoRoom>(grown)) return;
            if (auto* error = std::get_if<Error>(&grown)) {
                REQUIRE(*error == Error::kTooLarge, "extend");
                return;
            }
            auto added = std::get<std::span<const PageId>>(grown);
            const auto held = static_cast<int32_t>(sequence.pages.size());
            sequence.pages.insert(sequence.pages.end(), added.begin(), added.end());
            REQUIRE(static_cast<int32_t>(sequence.pages.size()) ==
                        std::max(held, sequence.launched / config_.page_tokens + 1),
                    "%d pages for %d tokens", static_cast<int32_t>(sequence.pages.size()), sequence.launched + 1);
            sequence.push(random_.below(alphabet_));
        }
        uint64_t state = sequence.launched == sequence.resume
                             ? (sequence.resume == 0 ? sequence.identity[0] : slots_[sequence.read])
                             : slots_[sequence.write];
        REQUIRE(state == sequence.identity[sequence.launched], "the state changed under sequence %lld",
                static_cast<long long>(sequence.id));
        for (int32_t i = 0; i < sequence.launched; ++i)
            REQUIRE(row(sequence, i) == sequence.identity[i + 1], "row %d changed under sequence %lld", i,
                    static_cast<long long>(sequence.id));
        for (int32_t i = sequence.launched; i < sequence.launched + count; ++i)
            if (i >= sequence.kv) row(sequence, i) = sequence.identity[i + 1];
        for (const auto& promised : sequence.promised)
            if (promised.tokens > sequence.launched && promised.tokens <= sequence.launched + count)
                slots_[promised.slot] = sequence.identity[promised.tokens];
        sequence.launched += count;
        slots_[sequence.write] = sequence.identity[sequence.launched];
    }

    void commit(Sequence& sequence) {
        sequence.committed += random_.below(sequence.launched - sequence.committed + 1);
        for (int again = random_.chance(20); again >= 0; --again) {
            REQUIRE(cache_->commit(sequence.id, sequence.tokens, sequence.committed).index() == 0, "commit");
            if (twin_) twin_->commit(sequence.id, sequence.tokens, sequence.committed);
        }
        int32_t snapshot = 0;
        for (const auto& promised : sequence.promised)
            if (promised.tokens <= sequence.committed) snapshot = promised.tokens;
        found(sequence, sequence.committed, snapshot);
        std::erase_if(sequence.promised, [&](const auto& promised) { return promised.tokens <= sequence.committed; });
    }

    void end(int32_t which, bool finish) {
        Sequence& sequence = running_[which];
        if (finish) {
            bool donate = random_.chance(80);
            REQUIRE(cache_->finish(sequence.id, sequence.tokens, sequence.launched, donate).index() == 0, "finish");
            if (twin_) twin_->finish(sequence.id, sequence.tokens, sequence.launched, donate);
            found(sequence, sequence.launched, donate && sequence.launched > sequence.resume ? sequence.launched : 0);
        } else {
            REQUIRE(cache_->abort(sequence.id).index() == 0, "abort");
            if (twin_) twin_->abort(sequence.id);
        }
        if (!sequence.tokens.empty()) {
            if (history_.size() < 24) history_.emplace_back();
            auto& slot = history_.size() < 24 ? history_.back() : history_[random_.below(24)];
            slot = sequence.tokens;
        }
        running_.erase(running_.begin() + which);
    }

    void fork(int32_t which) {
        Sequence& parent = running_[which];
        if (parent.launched < parent.prompt || parent.launched == parent.resume) return;
        auto result = cache_->fork(parent.id, next_id_, parent.tokens, parent.launched);
        if (twin_)
            REQUIRE(twin_->fork(parent.id, next_id_, parent.tokens, parent.launched).index() == result.index(), "twin");
        if (!std::holds_alternative<Fork>(result)) {
            REQUIRE(std::holds_alternative<NoRoom>(result), "fork");
            return;
        }
        const Fork& made = std::get<Fork>(result);
        Sequence child = parent;
        child.id = next_id_++;
        child.prompt = parent.launched;
        child.promised.clear();
        // The parent leaves its state where both read it, unless a snapshot is written there anyway.
        REQUIRE(slots_[made.parent_read] == parent.identity[parent.launched], "the parent's state is lost");
        if (made.parent_read != made.parent_write && parent.launched > parent.committed)
            parent.promised.push_back({parent.launched, made.parent_read});
        parent.write = made.parent_write;
        slots_[parent.write] = slots_[made.parent_read];
        child.read = child.write = -1;
        running_.push_back(child);
        accept(running_.back(), made.child);
        own(running_[which].write, running_[which]);
        if (random_.chance(50)) end(which, false);  // its child relies on rows that nobody published
    }

    void misuse(Sequence& sequence) {
        const auto length = static_cast<int32_t>(sequence.tokens.size());
        auto error = [](const auto& result) {
            return std::get_if<Error>(&result) ? static_cast<int>(std::get<Error>(result)) : -1;
        };
        auto expect = [&](const auto& result, Error wanted) {
            REQUIRE(error(result) == static_cast<int>(wanted), "error %d instead of %d", error(result),
                    static_cast<int>(wanted));
        };
        const RequestId unknown = -5;
        switch (random_.below(8)) {
            case 0:
                return expect(cache_->commit(unknown, sequence.tokens, 0), Error::kUnknownRequest);
            case 1:
                return expect(cache_->finish(unknown, sequence.tokens, 0), Error::kUnknownRequest);
            case 2:
                return expect(cache_->abort(unknown), Error::kUnknownRequest);
            case 3:
                return expect(cache_->extend(unknown, 1), Error::kUnknownRequest);
            case 4:
                return expect(cache_->commit(sequence.id, sequence.tokens, length + 1), Error::kTokensMissing);
            case 5:
                return expect(cache_->commit(sequence.id, sequence.tokens, sequence.committed - 1), Error::kBackwards);
            case 6:
                return expect(cache_->fork(sequence.id, sequence.id, sequence.tokens, length),
                              Error::kDuplicateRequest);
            default: {
                std::vector<Token> longer(sequence.tokens);
                longer.resize(sequence.pages.size() * config_.page_tokens + 1);
                return expect(cache_->commit(sequence.id, longer, static_cast<int32_t>(longer.size())),
                              Error::kBeyondPages);
            }
        }
    }

    // The first `count` tokens were published just now, and a state at `snapshot` of them: a prompt that goes on from
    // there finds them.
    void found(const Sequence& sequence, int32_t count, int32_t snapshot) {
        if (!config_.enabled || sequence.cleared) return;
        std::vector<Token> prompt(sequence.tokens.begin(), sequence.tokens.begin() + std::max(count, snapshot));
        prompt.push_back(alphabet_);
        Match match = cache_->probe(kNames[sequence.name_space], prompt);
        REQUIRE(match.kv_tokens >= count / config_.page_tokens * config_.page_tokens && match.state_tokens >= snapshot,
                "kv %d, state %d of %d and %d", match.kv_tokens, match.state_tokens, count, snapshot);
    }

    void clear(int name) {
        for (Sequence& sequence : running_) sequence.cleared |= sequence.name_space == name;
        for (Sequence& transfer : transfers_) transfer.cleared |= transfer.name_space == name;
        cache_->clear(kNames[name]);
        if (twin_) twin_->clear(kNames[name]);
        forgotten(name);
    }

    void clear_all() {
        for (Sequence& sequence : running_) sequence.cleared = true;
        for (Sequence& transfer : transfers_) transfer.cleared = true;
        cache_->clear_all();
        if (twin_) twin_->clear_all();
        for (int name = 0; name < 3; ++name) forgotten(name);
        REQUIRE(cache_->stats().namespaces == 0 && cache_->clear_all() == 0, "a namespace survives");
    }

    void forgotten(int name) {
        for (Token token = 0; token < alphabet_; ++token) {
            Match match = cache_->probe(kNames[name], std::vector<Token>{token, 0, 0});
            REQUIRE(match.known_tokens == 0, "a cleared namespace matches");
        }
    }

    Random random_;
    Config config_;
    std::unique_ptr<Cache> cache_, twin_;
    std::vector<std::vector<uint64_t>> rows_;  // [page][row]: identity of the prefix that ends there
    std::vector<uint64_t> slots_;              // [slot]: identity of the prefix consumed
    std::vector<Sequence> running_;
    std::vector<Transfer> transfers_;
    std::vector<Flight> flights_;
    std::vector<std::vector<uint64_t>> host_rows_;
    std::vector<uint64_t> host_slots_;
    std::map<NodeId, std::pair<NodeId, int32_t>> blocks_;
    std::vector<std::vector<Token>> history_;
    int32_t alphabet_ = 2;
    RequestId next_id_ = 1;
};

}  // namespace

int main(int argc, char** argv) {
    const int64_t operations = argc > 1 ? std::atoll(argv[1]) : 1'000'000;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    int64_t reported = 0;
    for (uint64_t episode = 0; operation < operations; ++episode) {
        episode_seed = Random{seed * 1'000'003 + episode}.next();
        Random length{episode_seed + 1};
        Episode(episode_seed).run(100 + length.below(1900));
        if (operation - reported >= 5'000'000) {
            std::printf("%lld operations\n", static_cast<long long>(reported = operation));
            std::fflush(stdout);
        }
    }
    std::printf(
        "%lld operations: %lld hits, %lld page copies, %lld pages appended in place, %lld snapshots evicted, "
        "%lld consumed in place, %lld forks, %lld received, %lld lent, "
        "%lld moved out, %lld moved in, %lld moves void, %lld evicted from the host, %lld refusals; no invariant "
        "broken, nothing "
        "leaked\n",
        static_cast<long long>(operation), static_cast<long long>(Episode::hits),
        static_cast<long long>(Episode::copies), static_cast<long long>(Episode::appended),
        static_cast<long long>(Episode::evicted), static_cast<long long>(Episode::consumed),
        static_cast<long long>(Episode::forks), static_cast<long long>(Episode::received),
        static_cast<long long>(Episode::lent), static_cast<long long>(Episode::moved_out),
        static_cast<long long>(Episode::moved_in), static_cast<long long>(Episode::moves_void),
        static_cast<long long>(Episode::host_evicted), static_cast<long long>(Episode::no_room));
    return 0;
}
