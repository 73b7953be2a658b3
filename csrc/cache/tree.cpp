#include "tree.h"

#include <algorithm>
#include <cassert>

namespace tokenspeed::cache {

namespace {

int32_t prefix_length(const Token* a, const Token* b, int32_t length) {
    int32_t i = 0;
    while (i < length && a[i] == b[i]) ++i;
    return i;
}

// Lexicographic by token; a prefix comes before what extends it.
bool before(const Token* a, int32_t a_length, const Token* b, int32_t b_length) {
    int32_t common = prefix_length(a, b, std::min(a_length, b_length));
    if (common < a_length && common < b_length) return a[common] < b[common];
    return a_length < b_length;
}

bool equal(const Token* a, const Token* b, int32_t length) {
    return std::memcmp(a, b, sizeof(Token) * length) == 0;
}

}  // namespace

void ChildList::insert(int32_t at, NodeId id) {
    if (capacity_ == 0 && size_ == 0) {
        one_ = id;
        size_ = 1;
        return;
    }
    if (size_ == std::max(capacity_, 1)) {
        int32_t capacity = size_ * 2;
        auto* grown = new NodeId[capacity];
        std::copy(begin(), end(), grown);
        if (capacity_) delete[] many_;
        many_ = grown;
        capacity_ = capacity;
    }
    std::copy_backward(many_ + at, many_ + size_, many_ + size_ + 1);
    many_[at] = id;
    ++size_;
}

void ChildList::erase(int32_t at) {
    --size_;
    if (capacity_ == 0) return;
    std::copy(many_ + at + 1, many_ + size_ + 1, many_ + at);
    if (size_ <= 1) {
        NodeId last = many_[0];
        delete[] many_;
        capacity_ = 0;
        one_ = last;
    }
}

void ChildList::clear() {
    if (capacity_) delete[] many_;
    size_ = capacity_ = 0;
}

NodeId Tree::allocate() {
    if (free_.empty()) {
        auto first = static_cast<NodeId>(chunks_.size() * kChunk);
        chunks_.push_back(
            {std::make_unique<Node[]>(kChunk), std::make_unique_for_overwrite<Token[]>(kChunk * page_tokens_)});
        for (uint32_t i = kChunk; i-- > 0;) free_.push_back(first + i);
    }
    NodeId id = free_.back();
    free_.pop_back();
    ++live_;
    return id;
}

NodeId Tree::create_root() {
    NodeId id = allocate();
    (*this)[id].jump = id;
    return id;
}

int32_t Tree::lower_bound(const Node& parent, const Token* tokens, int32_t length) const {
    const NodeId* first = parent.children.begin();
    const NodeId* found = std::lower_bound(first, parent.children.end(), 0, [&](NodeId child, int) {
        return before(this->tokens(child), (*this)[child].length, tokens, length);
    });
    return static_cast<int32_t>(found - first);
}

NodeId Tree::find(NodeId parent, const Token* tokens, int32_t length) const {
    const Node& node = (*this)[parent];
    if (node.children.size() == 0) return kNoNode;
    int32_t at = node.children.size() == 1 ? 0 : lower_bound(node, tokens, length);
    if (at == node.children.size()) return kNoNode;
    NodeId child = node.children[at];
    return (*this)[child].length == length && equal(this->tokens(child), tokens, length) ? child : kNoNode;
}

NodeId Tree::insert(NodeId parent, const Token* tokens, int32_t length) {
    assert(length > 0 && length <= page_tokens_);
    int32_t at = lower_bound((*this)[parent], tokens, length);
    const ChildList& children = (*this)[parent].children;
    if (at < children.size() && (*this)[children[at]].length == length &&
        equal(this->tokens(children[at]), tokens, length))
        return children[at];
    NodeId id = allocate();
    Node& above = (*this)[parent];
    Node& node = (*this)[id];
    node.parent = parent;
    node.length = static_cast<uint8_t>(length);
    node.end = above.end + length;
    const Node& over = (*this)[above.jump];
    const bool even = above.end - over.end == over.end - (*this)[over.jump].end;  // skew-binary skips
    node.jump = even ? over.jump : parent;
    std::memcpy(const_cast<Token*>(this->tokens(id)), tokens, sizeof(Token) * length);
    above.tails += length < page_tokens_;
    child_bytes_ -= above.children.heap_bytes();
    above.children.insert(at, id);
    child_bytes_ += above.children.heap_bytes();
    return id;
}

void Tree::erase(NodeId id) {
    Node& node = (*this)[id];
    assert(node.children.size() == 0 && !node.resident() && !node.has_snapshot() && node.list == ListName::kNone);
    if (node.parent != kNoNode) {
        Node& above = (*this)[node.parent];
        above.tails -= node.length < page_tokens_;
        int32_t at = above.children.size() == 1 ? 0 : lower_bound(above, tokens(id), node.length);
        assert(above.children[at] == id);
        child_bytes_ -= above.children.heap_bytes();
        above.children.erase(at);
        child_bytes_ += above.children.heap_bytes();
    }
    node.~Node();
    new (&node) Node();
    free_.push_back(id);
    --live_;
}

int32_t Tree::common_prefix(NodeId parent, const Token* tokens, int32_t length) const {
    const Node& node = (*this)[parent];
    length = std::min(length, page_tokens_);
    if (length == 0 || node.children.size() == 0) return 0;
    int32_t at = lower_bound(node, tokens, length), best = 0;
    for (int32_t i : {at - 1, at}) {  // in sorted order the best one is a neighbour
        if (i < 0 || i >= node.children.size()) continue;
        NodeId child = node.children[i];
        best = std::max(best,
                        prefix_length(this->tokens(child), tokens, std::min<int32_t>(length, (*this)[child].length)));
    }
    return best;
}

NodeId Tree::longest_tail(NodeId parent, const Token* tokens, int32_t length) const {
    const Node& node = (*this)[parent];
    length = std::min(length, page_tokens_ - 1);
    // What precedes tokens[0, length) in order is either a prefix of it or shares fewer tokens than any prefix could
    // have. Each round shortens `length`.
    while (length > 0 && node.tails > 0) {
        int32_t at = lower_bound(node, tokens, length);
        if (at < node.children.size()) {
            NodeId child = node.children[at];
            if ((*this)[child].length == length && equal(this->tokens(child), tokens, length)) return child;
        }
        if (at == 0) return kNoNode;
        NodeId child = node.children[at - 1];
        int32_t shared = prefix_length(this->tokens(child), tokens, std::min<int32_t>(length, (*this)[child].length));
        if (shared == (*this)[child].length) return child;
        length = shared;
    }
    return kNoNode;
}

NodeId Tree::resident_extension(NodeId parent, const Token* tokens, int32_t length) const {
    const Node& node = (*this)[parent];
    int32_t at = lower_bound(node, tokens, length);
    for (int32_t i = at; i < std::min(at + 2, node.children.size()); ++i) {  // itself, then its first extension
        NodeId child = node.children[i];
        if ((*this)[child].length < length || !equal(this->tokens(child), tokens, length)) return kNoNode;
        if ((*this)[child].resident()) return child;
    }
    return kNoNode;
}

NodeId Tree::snapshot_before(NodeId id) const {
    auto counts = [&](const Node& node) { return node.has_snapshot() && !node.superseded; };
    while ((*this)[id].parent != kNoNode) {
        const Node& node = (*this)[id];
        int32_t length = node.length - 1;
        for (;;) {
            NodeId tail = longest_tail(node.parent, tokens(id), length);
            if (tail == kNoNode) break;
            if (counts((*this)[tail])) return tail;
            length = (*this)[tail].length - 1;
        }
        id = node.parent;
        if (counts((*this)[id])) return id;
    }
    return kNoNode;
}

NodeId Tree::ancestor_ending_by(NodeId id, uint32_t end) const {
    while ((*this)[id].end > end) id = (*this)[(*this)[id].jump].end >= end ? (*this)[id].jump : (*this)[id].parent;
    return id;
}

bool Tree::is_prefix(NodeId shorter, NodeId id) const {
    const Node& target = (*this)[shorter];
    if ((*this)[id].end < target.end) return false;
    if (target.length == page_tokens_) return ancestor_ending_by(id, target.end) == shorter;
    // A tail has no children: compare it with the node of its page on the other path.
    NodeId beside = ancestor_ending_by(id, (target.end - target.length) + page_tokens_);
    if ((*this)[beside].parent != target.parent) return false;
    return equal(tokens(shorter), tokens(beside), target.length);
}

int64_t Tree::bytes() const {
    return static_cast<int64_t>(chunks_.size() * kChunk * sizeof(Node) + chunks_.capacity() * sizeof(Chunk) +
                                free_.capacity() * sizeof(NodeId)) +
           child_bytes_;
}

void NodeList::push_back(Tree& tree, NodeId id) {
    Node& node = tree[id];
    assert(node.list == ListName::kNone);
    node.list = name_;
    node.previous = back_;
    node.next = kNoNode;
    (back_ == kNoNode ? front_ : tree[back_].next) = id;
    back_ = id;
    ++size_;
}

void NodeList::remove(Tree& tree, NodeId id) {
    Node& node = tree[id];
    assert(node.list == name_);
    (node.previous == kNoNode ? front_ : tree[node.previous].next) = node.next;
    (node.next == kNoNode ? back_ : tree[node.next].previous) = node.previous;
    node.list = ListName::kNone;
    node.previous = node.next = kNoNode;
    --size_;
}

}  // namespace tokenspeed::cache
