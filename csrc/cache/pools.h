// Pages and slots as counted integers. Free ids are reused last in, first out: no order depends on addresses.
#pragma once

#include <cassert>
#include <cstdint>
#include <utility>
#include <vector>

namespace tokenspeed::cache {

using PageId = int32_t;
using SlotId = int32_t;

// A page is referenced by nodes and by running sequences. A *hold* is a reference that eviction cannot remove: a
// running sequence's, or a locked node's. A page with references and no hold is evictable.
class PagePool {
  public:
    explicit PagePool(int32_t count) : pages_(count) {
        free_.reserve(count);
        for (int32_t id = count - 1; id >= 0; --id) free_.push_back(id);
    }

    PageId take() {  // with one reference and one hold
        assert(!free_.empty());
        PageId id = free_.back();
        free_.pop_back();
        pages_[id] = {1, 1, 0, false};
        return id;
    }
    void add(PageId id, bool hold) {
        Page& page = pages_[id];
        assert(page.references > 0);
        ++page.references;
        if (hold) add_hold(id);
    }
    void remove(PageId id, bool hold) {
        if (hold) remove_hold(id);
        Page& page = pages_[id];
        assert(page.references > 0);
        if (--page.references == 0) {
            assert(page.holds == 0);
            --evictable_;
            free_.push_back(id);
        }
    }
    void add_hold(PageId id) { evictable_ -= pages_[id].holds++ == 0; }
    void remove_hold(PageId id) {
        assert(pages_[id].holds > 0);
        evictable_ += --pages_[id].holds == 0;
    }

    // Rows [0, fill) are what nodes refer to; the writer is the one sequence that may store rows from there on.
    int32_t fill(PageId id) const { return pages_[id].fill; }
    void raise_fill(PageId id, int32_t rows) {
        if (rows > pages_[id].fill) pages_[id].fill = static_cast<uint8_t>(rows);
    }
    bool has_writer(PageId id) const { return pages_[id].writer; }
    void set_writer(PageId id, bool writer) { pages_[id].writer = writer; }

    int32_t references(PageId id) const { return pages_[id].references; }
    int32_t holds(PageId id) const { return pages_[id].holds; }
    int32_t size() const { return static_cast<int32_t>(pages_.size()); }
    int32_t free() const { return static_cast<int32_t>(free_.size()); }
    int32_t evictable() const { return evictable_; }
    int64_t bytes() const {
        return static_cast<int64_t>(pages_.capacity() * sizeof(Page) + free_.capacity() * sizeof(PageId));
    }

  private:
    struct Page {
        int32_t references = 0, holds = 0;
        uint8_t fill = 0;
        bool writer = false;
    };
    std::vector<Page> pages_;
    std::vector<PageId> free_;
    int32_t evictable_ = 0;
};

class SlotPool;

// One owner or reader of a slot. The slot returns to its pool with the last of them.
class SlotRef {
  public:
    SlotRef() = default;
    SlotRef(SlotRef&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
    SlotRef& operator=(SlotRef&& other) noexcept {
        if (this != &other) {
            reset();
            pool_ = std::exchange(other.pool_, nullptr);
            id_ = other.id_;
        }
        return *this;
    }
    SlotRef(const SlotRef&) = delete;
    SlotRef& operator=(const SlotRef&) = delete;
    ~SlotRef() { reset(); }

    SlotRef share() const;
    void reset();
    SlotId id() const { return pool_ ? id_ : -1; }
    explicit operator bool() const { return pool_ != nullptr; }
    bool unique() const;

  private:
    friend class SlotPool;
    SlotRef(SlotPool* pool, SlotId id) : pool_(pool), id_(id) {}
    SlotPool* pool_ = nullptr;
    SlotId id_ = -1;
};

class SlotPool {
  public:
    explicit SlotPool(int32_t count) : references_(count, 0) {
        free_.reserve(count);
        for (int32_t id = count - 1; id >= 0; --id) free_.push_back(id);
    }
    SlotPool(const SlotPool&) = delete;
    SlotPool& operator=(const SlotPool&) = delete;

    SlotRef take() {
        assert(!free_.empty());
        SlotId id = free_.back();
        free_.pop_back();
        references_[id] = 1;
        return SlotRef(this, id);
    }
    int32_t references(SlotId id) const { return references_[id]; }
    int32_t size() const { return static_cast<int32_t>(references_.size()); }
    int32_t free() const { return static_cast<int32_t>(free_.size()); }
    int64_t bytes() const {
        return static_cast<int64_t>((references_.capacity() + free_.capacity()) * sizeof(int32_t));
    }

  private:
    friend class SlotRef;
    std::vector<int32_t> references_;
    std::vector<SlotId> free_;
};

inline SlotRef SlotRef::share() const {
    assert(pool_);
    ++pool_->references_[id_];
    return SlotRef(pool_, id_);
}
inline void SlotRef::reset() {
    if (!pool_) return;
    if (--pool_->references_[id_] == 0) pool_->free_.push_back(id_);
    pool_ = nullptr;
}
inline bool SlotRef::unique() const {
    return pool_ && pool_->references_[id_] == 1;
}

}  // namespace tokenspeed::cache
