// The emulated device: one fiber per CUDA thread, blocks in flight together, and the engines that work beside the
// threads. Everything runs on one host thread; at each wait the seeded scheduler picks who continues, so that an order
// that the hardware may choose, and the author forgot, comes up.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace tokenspeed::emulator {

struct Block;
struct Cluster;
struct Grid;
struct WarpGroup;

// Shared memory of one block: the requested bytes, a canary up to the page's end, then an inaccessible page. The shadow
// is what the async proxy (TMA, bulk copies, wgmma) sees: generic writes reach it at fence.proxy.async.
class SharedMemory {
  public:
    static constexpr size_t kLimit = 227 * 1024;  // of sm_90, per block
    SharedMemory();
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    void prepare(size_t bytes);  // fills both views with the poison, 0xFF: NaN in every float format
    void poison();
    bool canary_intact() const;
    void refresh_shadow();

    uint8_t* data() const { return data_; }
    uint8_t* shadow() { return shadow_.data(); }
    size_t bytes() const { return bytes_; }
    bool contains(const void* p) const {
        return p >= data_ && p <= data_ + bytes_;  // one past the end is a valid pointer
    }

  private:
    uint8_t* mapping_;
    uint8_t* data_;
    size_t bytes_ = 0;
    size_t accessible_ = 0;
    std::vector<uint8_t> shadow_;
};

// One warp-wide operation under way: lanes bring a payload, the last one completes it, everyone takes what it needs.
struct Collective {
    uint32_t mask = 0;  // 0: free
    uint32_t arrived = 0;
    uint32_t departed = 0;
    const char* name = nullptr;
    uint64_t payload[32][4];
    struct Thread* lanes[32];
};

struct Warp {
    std::vector<std::unique_ptr<Collective>> collectives;
    int registers = 0;  // per thread, as moved by setmaxnreg
};

// Copies that a thread started and has not waited for, by group.
struct CopyGroup {
    int unread = 0;     // sources not read yet
    int unwritten = 0;  // destinations not written yet
};

struct GroupQueue {
    std::vector<CopyGroup> groups;  // the last one is open, once there is one
    uint64_t first = 0;             // sequence number of groups.front()

    uint64_t open();  // sequence number of the open group
    void commit();
    CopyGroup* find(uint64_t sequence) { return sequence < first ? nullptr : &groups[sequence - first]; }
    // True when at most `pending` committed groups have copies left, or unread sources if `reads_only`.
    bool settled(uint64_t pending, bool reads_only);
};

struct Thread {
    Fiber fiber;
    Block* block = nullptr;
    uint3 index{};
    uint32_t linear = 0;
    bool done = false;
    uint64_t priority = 0;  // of two ready threads the higher goes on, when the scheduler happens to look at both

    // Why the thread does not run, for the scheduler and for the report. `poll` null: somebody will wake it.
    const char* waiting = nullptr;
    const void* wait_object = nullptr;
    uint64_t wait_value = 0;
    bool (*poll)(void*) = nullptr;
    void* poll_context = nullptr;

    uint64_t cluster_target = 0;  // barrier.cluster generation to wait for; 0: not arrived
    GroupQueue cp_async, bulk;
    bool waited_for_grid = false;
    bool impatient = false;  // its wait ends when nothing else can go on
    // wgmma
    uint64_t products_issued = 0;
    uint64_t products_committed = 0;  // groups
    bool product_fence = false;
};

struct NamedBarrier {
    uint32_t expected = 0;  // 0: nobody here yet
    uint32_t arrived = 0;
    std::vector<Thread*> waiting;
};

struct Block {
    Grid* grid = nullptr;
    Cluster* cluster = nullptr;
    uint32_t rank = 0;  // in the cluster
    uint3 index{};
    std::unique_ptr<SharedMemory> shared;
    std::vector<Thread> threads;
    std::vector<FiberStack*> stacks;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    uint32_t live = 0;
    std::vector<uint32_t> mbarriers;          // shared offsets of the initialised ones
    std::vector<uint32_t> unfenced_barriers;  // initialised, not yet followed by fence_mbarrier_init
    std::vector<std::unique_ptr<WarpGroup>> warp_groups;
    int free_registers = 0;
    bool triggered = false;  // some thread executed griddepcontrol.launch_dependents
};

struct Cluster {
    Grid* grid = nullptr;
    uint3 index{};
    std::vector<std::unique_ptr<Block>> blocks;
    uint32_t live = 0;
    uint32_t arrived = 0;
    uint64_t generation = 1;
};

struct Grid {
    dim3 grid, block, cluster;
    size_t shared_bytes = 0;
    bool programmatic = false, takes_flags = false;
    const void* stream = nullptr;
    uint64_t priority = 0;  // of its stream's threads, where they have one
    std::function<void()> body;
    const void* kernel = nullptr;

    uint64_t clusters = 0;  // in the whole grid
    uint64_t started = 0;
    uint64_t finished = 0;
    bool predecessors_done = false;
    std::vector<std::unique_ptr<Cluster>> resident;
    bool complete() const { return finished == clusters; }
};

// A copy that an engine carries out beside the threads, in up to two steps at times of the scheduler's choosing.
struct AsyncCopy {
    const char* name = "";
    Block* from = nullptr;        // reads this block's shared memory in the read step
    std::vector<Block*> into;     // writes these blocks' shared memory
    GroupQueue* queue = nullptr;  // whose group it belongs to; null when an mbarrier tracks it
    uint64_t group = 0;
    Cluster* cluster = nullptr;   // of the thread that started it
    bool lazy = false;            // delivered only when nothing else can go on
    std::function<void()> read;   // source to staging; empty when the source is global memory
    std::function<void()> write;  // to the destination, and the completion
};

// splitmix64: a draw at each scheduling step must cost little.
class Random {
  public:
    void seed(uint64_t seed) { state_ = seed; }
    uint64_t operator()() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }
    size_t below(size_t limit) { return static_cast<size_t>(static_cast<unsigned __int128>((*this)()) * limit >> 64); }

  private:
    uint64_t state_ = 0;
};

struct Policy {
    // Chances out of 256.
    int deliver_at_once = 0;  // a copy, when it starts
    int deliver_any = 0;      // some copy, at each scheduling step
    int poll = 0;             // look at all waiting threads, at each scheduling step
    int product_at_once = 0;  // a wgmma group, when the last thread commits it
    int copy_before_product = 128;
    int early_successor = 256;
    // Threads looked at before one is picked: 1 is a fair shuffle, many let some run far ahead of others.
    int candidates = 1;
    int priority_scope = 0;  // threads of one priority: 0 each its own, 1 a warp, 2 a block, 3 a stream
    int late_blocks = 0;     // a block, or a warp, starts only when nobody else can go on
    int late_warps = 0;
    int lazy_loads = 0;  // a copy to shared memory, or to global memory, waits for everything else
    int lazy_stores = 256;
    uint64_t window = 1;  // clusters of a grid resident at first; grows when all wait
};

extern Thread* current_thread;  // null while the scheduler or an engine runs

class Machine {
  public:
    // Queues a grid and, unless launches are deferred, runs everything queued.
    cudaError_t submit(std::unique_ptr<Grid> grid);
    cudaError_t synchronize();

    void set_seed(uint64_t seed);
    void defer(bool on) { deferred_ = on; }
    void set_multiprocessors(int count) { multiprocessors_ = count; }
    int multiprocessors() const { return multiprocessors_; }
    int last_clusters() const { return last_clusters_; }        // of the latest launch
    int cluster_launches() const { return cluster_launches_; }  // of several blocks a cluster, since the start
    uint64_t resident_blocks(const Grid& grid) const;           // that the device holds at once; 0: does not fit
    const std::string& report() const { return report_; }
    void set_report(const std::string& text) { report_ = text; }

    // ---- for the wrappers, called on a thread's fiber
    void yield();                                                    // lets others run
    void park(const char* why, const void* object, uint64_t value);  // until wake()
    void wake(Thread& thread);
    template <typename Predicate>
    void wait_until(const char* why, const void* object, uint64_t value, Predicate predicate) {
        if (predicate()) return;
        current_thread->poll = [](void* context) { return (*static_cast<Predicate*>(context))(); };
        current_thread->poll_context = &predicate;
        pollers_.push_back(current_thread);
        park(why, object, value);
    }
    void start_copy(std::unique_ptr<AsyncCopy> copy);
    void deliver_all(const GroupQueue& queue);
    bool chance(int of_256) { return static_cast<int>(random_() & 255) < of_256; }
    const Policy& policy() const { return policy_; }
    // Ends the launch with a report that says what the kernel did wrong and where.
    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  private:
    struct Failure {};

    // Grids of one stream, in order; streams run beside one another, as those of several cards do.
    struct Stream {
        std::vector<Grid*> grids;
        size_t current = 0;
        bool complete() const { return current == grids.size(); }
    };
    std::vector<Stream> streams();
    void begin(Stream& stream);
    void run_until_complete(std::vector<Stream>& streams);
    void start_early(Stream& stream, size_t index);
    void start_follower(Stream& stream);
    bool admit_any(std::vector<Stream>& streams);
    bool lose_patience();
    bool run_ready();  // false: nobody can run
    bool step();       // lets an engine or a poll make progress; false: nothing left to do
    bool poll_waiting();
    bool deliver(size_t index);
    bool run_products();
    bool start_late();
    bool deliver_lazy();
    bool admit(Grid& grid);
    void start_block(Block& block);
    void retire(Cluster& cluster);
    void finish_block(Block& block);
    Thread& next_thread();
    void resume(Thread& thread);
    void thread_exited(Thread& thread);
    void reset();
    static void thread_entry();

    Random random_;
    uint64_t seed_ = 0;
    Policy policy_;
    bool deferred_ = false;
    int multiprocessors_ = 4, last_clusters_ = 0, cluster_launches_ = 0;
    std::string report_;
    bool failed_ = false;

    Fiber scheduler_;
    struct Ready {
        uint64_t priority;
        Thread* thread;
    };
    void make_ready(Thread& thread) { ready_.push_back({thread.priority, &thread}); }
    std::deque<Ready> ready_;
    std::vector<Thread*> late_;  // not started yet
    std::vector<Thread*> pollers_;
    std::vector<std::unique_ptr<AsyncCopy>> copies_;
    std::vector<std::unique_ptr<Grid>> queue_;
    std::vector<std::unique_ptr<FiberStack>> all_stacks_;
    std::vector<FiberStack*> free_stacks_;
    std::vector<std::unique_ptr<SharedMemory>> free_shared_;
    uint64_t idle_yields_ = 0;
};

Machine& machine();

}  // namespace tokenspeed::emulator
