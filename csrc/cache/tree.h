// The radix tree: one node per page of token ids, children ordered by content. Knows nothing of eviction.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "pools.h"

namespace tokenspeed::cache {

using Token = int32_t;
using NodeId = uint32_t;
inline constexpr NodeId kNoNode = ~NodeId{0};
inline constexpr uint32_t kNoSnapshot = ~0u;

// Ordered node ids. Most nodes have one child, which is stored inline.
class ChildList {
  public:
    ChildList() = default;
    ChildList(const ChildList&) = delete;
    ChildList& operator=(const ChildList&) = delete;
    ~ChildList() { clear(); }

    int32_t size() const { return size_; }
    const NodeId* data() const { return capacity_ ? many_ : &one_; }
    NodeId operator[](int32_t i) const { return data()[i]; }
    const NodeId* begin() const { return data(); }
    const NodeId* end() const { return data() + size_; }
    void insert(int32_t at, NodeId id);
    void erase(int32_t at);
    void clear();
    int64_t heap_bytes() const { return static_cast<int64_t>(capacity_) * sizeof(NodeId); }

  private:
    union {
        NodeId one_;
        NodeId* many_;
    };
    int32_t size_ = 0, capacity_ = 0;
};

enum class ListName : uint8_t { kNone, kIdle, kGhosts };

struct Node {
    ChildList children;
    NodeId parent = kNoNode;
    NodeId jump = kNoNode;                      // an ancestor some powers of two above: climbs take logarithmic time
    NodeId previous = kNoNode, next = kNoNode;  // of the list named below
    PageId page = -1;                           // -1: not on the device
    PageId host_page = -1;                      // -1: not in host memory
    uint32_t end = 0;                           // tokens from the root to the end of this node
    uint32_t locks = 0;                         // sequences that use the page + locked children
    uint32_t keeps = 0;                         // sequences that will need the node + kept children
    uint32_t resident_children = 0;
    uint32_t tails = 0;               // children shorter than a page
    uint32_t snapshot = kNoSnapshot;  // index into Snapshots
    uint32_t host_uses = 0;           // host snapshots and moves that need the host page + children with any
    uint32_t promises = 0;            // running sequences with a snapshot promised here
    uint32_t last_used = 0;           // admission number, where a snapshot was let go
    uint8_t length = 0;               // tokens in this node
    ListName list = ListName::kNone;
    bool snapshot_lost = false;  // a snapshot here was evicted or declined
    uint8_t superseded = 0;      // its snapshot was resumed from or passed: later ones look past it. 2: passed since
    bool cleared = false;        // root of a forgotten namespace that still runs
    bool state = false;          // its snapshot has a slot on the device
    bool leaving = false;        // a move under way will give it a host page
    bool announced = false;      // a whole page that the event log has told of

    bool resident() const { return page >= 0; }
    bool has_snapshot() const { return snapshot != kNoSnapshot; }  // on the device, in host memory or in both
};

class Tree {
  public:
    explicit Tree(int32_t page_tokens) : page_tokens_(page_tokens) {}

    Node& operator[](NodeId id) { return chunks_[id / kChunk].nodes[id % kChunk]; }
    const Node& operator[](NodeId id) const { return chunks_[id / kChunk].nodes[id % kChunk]; }
    const Token* tokens(NodeId id) const { return chunks_[id / kChunk].tokens.get() + id % kChunk * page_tokens_; }

    NodeId create_root();
    // The child of `parent` that equals tokens[0, length), or kNoNode.
    NodeId find(NodeId parent, const Token* tokens, int32_t length) const;
    // The same, created where missing (no page, unlocked).
    NodeId insert(NodeId parent, const Token* tokens, int32_t length);
    void erase(NodeId id);  // no children, in no list, no page, no snapshot

    // The longest common prefix of tokens[0, length) with any child, at most one page.
    int32_t common_prefix(NodeId parent, const Token* tokens, int32_t length) const;
    // The longest tail of `parent` with length <= `length` that is a prefix of `tokens`, or kNoNode.
    NodeId longest_tail(NodeId parent, const Token* tokens, int32_t length) const;
    // A child of `parent` with a page whose first `length` tokens equal `tokens`, nearest in order; or kNoNode.
    NodeId resident_extension(NodeId parent, const Token* tokens, int32_t length) const;

    // The deepest snapshot strictly before `node` on its path that is not superseded.
    NodeId snapshot_before(NodeId node) const;
    // Whether the tokens up to the end of `shorter` begin the path to `node`.
    bool is_prefix(NodeId shorter, NodeId node) const;

    int32_t page_tokens() const { return page_tokens_; }
    int64_t size() const { return live_; }
    int64_t bytes() const;
    int64_t token_bytes() const { return static_cast<int64_t>(chunks_.size()) * kChunk * page_tokens_ * sizeof(Token); }

  private:
    static constexpr uint32_t kChunk = 256;
    struct Chunk {
        std::unique_ptr<Node[]> nodes;
        std::unique_ptr<Token[]> tokens;
    };

    NodeId allocate();
    NodeId ancestor_ending_by(NodeId id, uint32_t end) const;  // the deepest one at or above `id` with Node::end <= end
    int32_t lower_bound(const Node& parent, const Token* tokens, int32_t length) const;

    int32_t page_tokens_;
    std::vector<Chunk> chunks_;
    std::vector<NodeId> free_;
    int64_t live_ = 0;
    int64_t child_bytes_ = 0;
};

// A doubly linked list through the nodes; the front goes first.
class NodeList {
  public:
    explicit NodeList(ListName name) : name_(name) {}
    void push_back(Tree& tree, NodeId id);
    void remove(Tree& tree, NodeId id);
    NodeId front() const { return front_; }
    int32_t size() const { return size_; }

  private:
    ListName name_;
    NodeId front_ = kNoNode, back_ = kNoNode;
    int32_t size_ = 0;
};

}  // namespace tokenspeed::cache
