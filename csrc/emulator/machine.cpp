#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <utility>

#include "fault.h"
#include "intrinsics.h"
#include "report.h"
#include "synchronization.h"
#include "warp_group.h"

namespace tokenspeed::emulator {

Thread* current_thread = nullptr;

Machine& machine() {
    static Machine instance;
    return instance;
}

// ---- shared memory

namespace {
constexpr uint8_t kPoison = 0xFF;
constexpr uint8_t kCanary = 0xA5;
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t kMaximumThreads = 1024;
constexpr uint64_t kIdleYieldLimit = 1u << 21;  // a loop that only tests and yields this often will never end
}  // namespace

SharedMemory::SharedMemory() {
    void* mapping = mmap(nullptr, kLimit + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<uint8_t*>(mapping);
    data_ = mapping_ + kPage;
}

SharedMemory::~SharedMemory() {
    munmap(mapping_, kLimit + 2 * kPage);
}

void SharedMemory::prepare(size_t bytes) {
    const size_t wanted = (bytes + kPage - 1) / kPage * kPage;
    if (wanted != accessible_) {
        if (accessible_ > 0) mprotect(data_, accessible_, PROT_NONE);
        if (wanted > 0) mprotect(data_, wanted, PROT_READ | PROT_WRITE);
        accessible_ = wanted;
    }
    bytes_ = bytes;
    memset(data_ + bytes, kCanary, wanted - bytes);
    shadow_.resize(bytes);
    poison();
}

void SharedMemory::poison() {
    memset(data_, kPoison, bytes_);
    std::fill(shadow_.begin(), shadow_.end(), kPoison);
}

bool SharedMemory::canary_intact() const {
    return std::all_of(data_ + bytes_, data_ + accessible_, [](uint8_t byte) { return byte == kCanary; });
}

void SharedMemory::refresh_shadow() {
    memcpy(shadow_.data(), data_, bytes_);
}

// ---- copy groups

uint64_t GroupQueue::open() {
    if (groups.empty()) groups.emplace_back();
    return first + groups.size() - 1;
}

void GroupQueue::commit() {
    open();
    groups.emplace_back();
    while (groups.size() > 1 && groups.front().unread == 0 && groups.front().unwritten == 0) {
        groups.erase(groups.begin());
        ++first;
    }
}

bool GroupQueue::settled(uint64_t pending, bool reads_only) {
    if (groups.size() <= pending + 1) return true;
    return std::all_of(groups.begin(), groups.end() - 1 - static_cast<ptrdiff_t>(pending), [=](const CopyGroup& group) {
        return group.unread == 0 && (reads_only || group.unwritten == 0);
    });
}

// ---- threads

void Machine::thread_entry() {
    Machine& self = machine();
    fiber_started(self.scheduler_);
    current_thread->block->grid->body();
    current_thread->done = true;
    fiber_switch(current_thread->fiber, self.scheduler_);
    abort();  // an exited thread is never resumed
}

void Machine::resume(Thread& thread) {
    thread.waiting = nullptr;
    current_thread = &thread;
    const Block& block = *thread.block;
    coordinates = {thread.index, block.index, block.grid->block, block.grid->grid, thread.linear % 32};
    fiber_switch(scheduler_, thread.fiber);
    current_thread = nullptr;
    if (failed_) throw Failure{};
    if (thread.done) thread_exited(thread);
}

void Machine::yield() {
    if (++idle_yields_ > kIdleYieldLimit) fail("livelock: threads test without end and nothing else happens");
    make_ready(*current_thread);
    fiber_switch(current_thread->fiber, scheduler_);
}

void Machine::park(const char* why, const void* object, uint64_t value) {
    current_thread->waiting = why;
    current_thread->wait_object = object;
    current_thread->wait_value = value;
    fiber_switch(current_thread->fiber, scheduler_);
}

void Machine::wake(Thread& thread) {
    idle_yields_ = 0;
    make_ready(thread);
}

void Machine::thread_exited(Thread& thread) {
    idle_yields_ = 0;
    Block& block = *thread.block;
    if (thread.cluster_target != 0 && thread.cluster_target > block.cluster->generation) {
        // Arrived and left without waiting: it stays counted in the generation under way.
        --block.cluster->arrived;
    }
    --block.live;
    --block.cluster->live;
    release_block_barrier(block);
    release_cluster_barrier(*block.cluster);
    free_stacks_.push_back(thread.fiber.stack);
    if (block.live == 0) finish_block(block);
    if (block.cluster->live == 0) retire(*block.cluster);
}

// ---- blocks

uint64_t Machine::resident_blocks(const Grid& grid) const {
    const uint64_t threads = static_cast<uint64_t>(grid.block.x) * grid.block.y * grid.block.z;
    const uint64_t cluster = static_cast<uint64_t>(grid.cluster.x) * grid.cluster.y * grid.cluster.z;
    if (threads == 0 || threads > kMaximumThreads || grid.shared_bytes > SharedMemory::kLimit) return 0;
    const uint64_t per_multiprocessor =
        std::min<uint64_t>({32, 2048 / ((threads + 31) / 32 * 32), 228 * 1024 / (grid.shared_bytes + 1024)});
    const uint64_t blocks = per_multiprocessor * static_cast<uint64_t>(multiprocessors_);
    return std::max<uint64_t>(blocks / cluster, 1) * cluster;
}

void Machine::start_block(Block& block) {
    const Grid& grid = *block.grid;
    const uint32_t count = grid.block.x * grid.block.y * grid.block.z;
    if (free_shared_.empty()) free_shared_.push_back(std::make_unique<SharedMemory>());
    block.shared = std::move(free_shared_.back());
    free_shared_.pop_back();
    block.shared->prepare(grid.shared_bytes);
    block.live = count;
    block.warps.resize((count + 31) / 32);
    prepare_registers(block);
    block.threads.resize(count);
    uint64_t priority = policy_.priority_scope == 3 ? grid.priority : random_();
    const bool late_block = chance(policy_.late_blocks);
    bool late_warp = false;
    for (uint32_t i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        if (policy_.priority_scope == 0 || (policy_.priority_scope == 1 && i % 32 == 0)) priority = random_();
        thread.priority = priority;
        thread.block = &block;
        thread.linear = i;
        thread.index = {i % grid.block.x, i / grid.block.x % grid.block.y, i / (grid.block.x * grid.block.y)};
        if (free_stacks_.empty()) {
            all_stacks_.push_back(std::make_unique<FiberStack>());
            free_stacks_.push_back(all_stacks_.back().get());
        }
        fiber_prepare(thread.fiber, *free_stacks_.back(), thread_entry);
        free_stacks_.pop_back();
        if (i % 32 == 0) late_warp = late_block || chance(policy_.late_warps);
        if (late_warp) {
            late_.push_back(&thread);
        } else {
            make_ready(thread);
        }
    }
}

bool Machine::start_late() {
    if (late_.empty()) return false;
    for (Thread* thread : late_) make_ready(*thread);
    late_.clear();
    return true;
}

bool Machine::admit(Grid& grid) {
    const uint64_t size = static_cast<uint64_t>(grid.cluster.x) * grid.cluster.y * grid.cluster.z;
    if (grid.started == grid.clusters || grid.resident.size() * size >= resident_blocks(grid)) return false;
    const dim3 count(grid.grid.x / grid.cluster.x, grid.grid.y / grid.cluster.y, grid.grid.z / grid.cluster.z);
    auto cluster = std::make_unique<Cluster>();
    const auto position = static_cast<uint32_t>(grid.started++);
    cluster->grid = &grid;
    cluster->index = {position % count.x, position / count.x % count.y, position / (count.x * count.y)};
    for (uint32_t rank = 0; rank < size; ++rank) {
        auto block = std::make_unique<Block>();
        block->grid = &grid;
        block->cluster = cluster.get();
        block->rank = rank;
        block->index = {cluster->index.x * grid.cluster.x + rank % grid.cluster.x,
                        cluster->index.y * grid.cluster.y + rank / grid.cluster.x % grid.cluster.y,
                        cluster->index.z * grid.cluster.z + rank / (grid.cluster.x * grid.cluster.y)};
        start_block(*block);
        cluster->live += block->live;
        cluster->blocks.push_back(std::move(block));
    }
    grid.resident.push_back(std::move(cluster));
    return true;
}

void Machine::finish_block(Block& block) {
    if (!block.shared->canary_intact()) {
        fail("%s wrote past the end of its %zu bytes of dynamic shared memory", block_name(block).c_str(),
             block.shared->bytes());
    }
    for (const auto& copy : copies_) {
        if (copy->from == &block && copy->read) {
            fail("%s exits while a %s still reads its shared memory", block_name(block).c_str(), copy->name);
        }
        const bool into = std::find(copy->into.begin(), copy->into.end(), &block) != copy->into.end();
        if (into && copy->queue == nullptr) {
            fail("%s exits while a %s still writes its shared memory", block_name(block).c_str(), copy->name);
        }
    }
    block.shared->poison();  // a peer of the cluster that reads it now reads NaN
}

void Machine::retire(Cluster& cluster) {
    for (size_t i = copies_.size(); i-- > 0;) {
        while (i < copies_.size() && copies_[i]->cluster == &cluster) deliver(i);
    }
    for (auto& block : cluster.blocks) free_shared_.push_back(std::move(block->shared));
    Grid& grid = *cluster.grid;
    ++grid.finished;
    std::erase_if(grid.resident, [&](const auto& other) { return other.get() == &cluster; });
    if (grid.predecessors_done && grid.resident.size() < policy_.window) admit(grid);
}

// ---- engines

void Machine::start_copy(std::unique_ptr<AsyncCopy> copy) {
    idle_yields_ = 0;
    copy->cluster = current_thread->block->cluster;
    copy->lazy = chance(copy->into.empty() ? policy_.lazy_stores : policy_.lazy_loads);
    if (copy->queue != nullptr) {
        copy->group = copy->queue->open();
        copy->queue->find(copy->group)->unread += copy->read ? 1 : 0;
        copy->queue->find(copy->group)->unwritten += 1;
    }
    copies_.push_back(std::move(copy));
    if (chance(policy_.deliver_at_once)) {
        const size_t mine = copies_.size() - 1;
        if (deliver(mine) && mine < copies_.size() && chance(128)) deliver(mine);
    }
}

// Carries out the next step of copy `index`. Returns whether the copy has another step left.
bool Machine::deliver(size_t index) {
    idle_yields_ = 0;
    AsyncCopy& copy = *copies_[index];
    if (copy.read) {
        copy.read();
        copy.read = nullptr;
        if (copy.queue != nullptr) copy.queue->find(copy.group)->unread -= 1;
        return true;
    }
    const auto done = std::move(copies_[index]);
    copies_.erase(copies_.begin() + static_cast<ptrdiff_t>(index));
    done->write();
    if (done->queue != nullptr) done->queue->find(done->group)->unwritten -= 1;
    return false;
}

void Machine::deliver_all(const GroupQueue& queue) {
    for (size_t i = copies_.size(); i-- > 0;) {
        while (i < copies_.size() && copies_[i]->queue == &queue) deliver(i);
    }
}

bool Machine::poll_waiting() {
    bool any = false;
    size_t kept = 0;
    for (Thread* thread : pollers_) {
        if (thread->poll(thread->poll_context)) {
            wake(*thread);
            any = true;
        } else {
            pollers_[kept++] = thread;
        }
    }
    pollers_.resize(kept);
    return any;
}

bool Machine::run_products() {
    for (const auto& grid : queue_) {
        for (const auto& cluster : grid->resident) {
            for (const auto& block : cluster->blocks) {
                for (const auto& group : block->warp_groups) {
                    if (group && group->execute_waited_for()) return true;
                }
            }
        }
    }
    return false;
}

bool Machine::step() {
    if (poll_waiting()) return true;
    const auto some_copies = [&] {
        std::vector<size_t> prompt;
        for (size_t i = 0; i < copies_.size(); ++i) {
            if (!copies_[i]->lazy) prompt.push_back(i);
        }
        // Thousands may be under way: a step carries out up to an eighth of them, the oldest or any.
        std::vector<size_t> chosen;
        for (size_t left = (prompt.size() + 7) / 8; left > 0; --left) {
            const size_t pick = seed_ == 0 ? chosen.size() : random_.below(prompt.size());
            chosen.push_back(prompt[pick]);
            if (seed_ != 0) prompt.erase(prompt.begin() + static_cast<ptrdiff_t>(pick));
        }
        std::sort(chosen.rbegin(), chosen.rend());  // from the back: what is delivered leaves the list
        for (const size_t index : chosen) {
            if (index < copies_.size()) deliver(index);
        }
        return !chosen.empty();
    };
    if (chance(policy_.copy_before_product)) return some_copies() || run_products();
    return run_products() || some_copies();
}

bool Machine::deliver_lazy() {
    if (copies_.empty()) return false;
    deliver(seed_ == 0 ? 0 : random_.below(copies_.size()));
    return true;
}

bool Machine::run_ready() {
    if (ready_.empty()) return false;
    if (!copies_.empty() && chance(policy_.deliver_any)) deliver(random_.below(copies_.size()));
    if (!pollers_.empty() && chance(policy_.poll)) poll_waiting();
    resume(next_thread());
    return true;
}

// First in, first out with seed 0, else the best of a few drawn at random.
Thread& Machine::next_thread() {
    size_t best = 0;
    if (seed_ != 0) {
        best = random_.below(ready_.size());
        for (int i = 1; i < policy_.candidates; ++i) {
            const size_t other = random_.below(ready_.size());
            if (ready_[other].priority > ready_[best].priority) best = other;
        }
    }
    Thread& next = *ready_[best].thread;
    ready_[best] = ready_.front();
    ready_.pop_front();
    return next;
}

// ---- grids

void Machine::set_seed(uint64_t seed) {
    seed_ = seed;
    random_.seed(seed);
}

std::vector<Machine::Stream> Machine::streams() {
    std::vector<Stream> result;
    for (const auto& grid : queue_) {
        const auto same = [&](const Stream& stream) { return stream.grids[0]->stream == grid->stream; };
        auto found = std::find_if(result.begin(), result.end(), same);
        if (found == result.end()) found = result.insert(result.end(), Stream{});
        found->grids.push_back(grid.get());
    }
    return result;
}

void Machine::begin(Stream& stream) {
    start_early(stream, stream.current + 1);
    Grid& grid = *stream.grids[stream.current];
    grid.predecessors_done = true;
    while (grid.resident.size() < policy_.window && admit(grid)) {
    }
}

bool Machine::admit_any(std::vector<Stream>& streams) {
    return std::any_of(streams.begin(), streams.end(), [&](const Stream& stream) {
        return !stream.complete() && admit(*stream.grids[stream.current]);
    });
}

bool Machine::lose_patience() {
    bool any = false;
    for (Thread* thread : pollers_) {
        any |= thread->impatient;
        thread->impatient = false;
    }
    return any && poll_waiting();
}

void Machine::run_until_complete(std::vector<Stream>& streams) {
    for (Stream& stream : streams) begin(stream);
    while (true) {
        for (Stream& stream : streams) {
            while (!stream.complete() && stream.grids[stream.current]->complete()) {
                if (++stream.current < stream.grids.size()) begin(stream);
            }
            start_follower(stream);
        }
        const auto under_way = std::find_if_not(streams.begin(), streams.end(), std::mem_fn(&Stream::complete));
        if (under_way == streams.end()) return;
        // Threads that only test and yield count as waiting, once each has had its turns.
        const bool all_test = idle_yields_ > 4 * ready_.size() + 256;
        if (all_test && (step() || start_late() || deliver_lazy() || admit_any(streams))) continue;
        if (run_ready() || step() || start_late() || deliver_lazy() || admit_any(streams)) continue;
        if (lose_patience()) continue;
        fail("deadlock: every thread waits\n%s", describe_state(*under_way->grids[under_way->current]).c_str());
    }
}

static bool lets_successor(const Grid& grid) {
    return std::all_of(grid.resident.begin(), grid.resident.end(), [](const auto& cluster) {
        return std::all_of(cluster->blocks.begin(), cluster->blocks.end(),
                           [](const auto& block) { return block->triggered || block->live == 0; });
    });
}

// Runs some blocks of a programmatic successor up to their wait before their predecessor has done anything: whatever
// they read or write too early shows.
void Machine::start_early(Stream& stream, size_t index) {
    if (index >= stream.grids.size() || !stream.grids[index]->programmatic || stream.grids[index]->takes_flags) return;
    if (!chance(policy_.early_successor)) return;
    Grid& grid = *stream.grids[index];
    while (grid.resident.size() < policy_.window && admit(grid)) {
    }
    while (run_ready() || step() || start_late() || deliver_lazy()) {
    }
    if (lets_successor(grid)) start_early(stream, index + 1);
}

// Starts a successor that takes flags from the grid under way, once every block of that has let it.
void Machine::start_follower(Stream& stream) {
    if (stream.current + 1 >= stream.grids.size() || policy_.early_successor == 0) return;
    const Grid& ahead = *stream.grids[stream.current];
    Grid& grid = *stream.grids[stream.current + 1];
    if (!grid.takes_flags || grid.started > 0 || ahead.started < ahead.clusters || !lets_successor(ahead)) return;
    while (grid.resident.size() < policy_.window && admit(grid)) {
    }
}

cudaError_t Machine::submit(std::unique_ptr<Grid> grid) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    const auto divides = [](uint32_t whole, uint32_t part) { return part != 0 && whole % part == 0; };
    const uint64_t cluster = static_cast<uint64_t>(grid->cluster.x) * grid->cluster.y * grid->cluster.z;
    if (!divides(grid->grid.x, grid->cluster.x) || !divides(grid->grid.y, grid->cluster.y) ||
        !divides(grid->grid.z, grid->cluster.z) || cluster > 16 || resident_blocks(*grid) == 0) {
        report_ = "illegal launch: grid " + text(grid->grid) + ", block " + text(grid->block) + ", cluster " +
                  text(grid->cluster) + ", " + std::to_string(grid->shared_bytes) + " bytes of dynamic shared memory";
        return cudaErrorInvalidConfiguration;
    }
    grid->clusters = static_cast<uint64_t>(grid->grid.x) * grid->grid.y * grid->grid.z / cluster;
    last_clusters_ = static_cast<int>(grid->clusters);
    cluster_launches_ += cluster > 1;
    queue_.push_back(std::move(grid));
    return deferred_ ? cudaSuccess : synchronize();
}

cudaError_t Machine::synchronize() {
    failed_ = false;
    report_.clear();
    policy_ = Policy{};
    auto queued = streams();
    if (seed_ != 0) {
        const int speeds[] = {0, 0, 16, 96, 256};
        policy_.deliver_at_once = speeds[random_() % 5];
        policy_.deliver_any = speeds[random_() % 4];
        policy_.poll = speeds[1 + random_() % 3];
        policy_.product_at_once = speeds[random_() % 5];
        policy_.copy_before_product = speeds[random_() % 5];
        policy_.early_successor = random_() % 4 == 0 ? 0 : 256;
        policy_.candidates = std::array{1, 1, 4, 16}[random_() % 4];
        policy_.priority_scope = static_cast<int>(random_() % (queued.size() > 1 ? 4 : 3));
        policy_.late_blocks = speeds[random_() % 4];
        policy_.late_warps = speeds[random_() % 4];
        policy_.lazy_loads = speeds[random_() % 5];
        policy_.lazy_stores = speeds[random_() % 5];
        policy_.window = 1 + random_() % 4;
    }
    for (const Stream& stream : queued) {
        const uint64_t priority = policy_.priority_scope == 3 ? random_() : 0;
        for (Grid* grid : stream.grids) grid->priority = priority;
    }
    const FaultGuard guard;
    try {
        run_until_complete(queued);
        queue_.clear();
    } catch (const Failure&) {
        reset();
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

void Machine::reset() {
    current_thread = nullptr;
    ready_.clear();
    late_.clear();
    pollers_.clear();
    copies_.clear();
    queue_.clear();
    free_stacks_.clear();
    for (const auto& stack : all_stacks_) free_stacks_.push_back(stack.get());
    idle_yields_ = 0;
}

void Machine::fail(const char* format, ...) {
    char message[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    report_ = message;
    if (current_thread == nullptr) throw Failure{};
    report_ += "\n  in " + thread_name(*current_thread);
    failed_ = true;
    fiber_switch(current_thread->fiber, scheduler_);
    abort();  // a failed thread is never resumed
}

}  // namespace tokenspeed::emulator
