#include "warp_group.h"

#include <cstring>

#include "elements.h"
#include "report.h"

namespace tokenspeed::emulator {

namespace {

constexpr int kRows = 64;

int depth_of(Element element) {
    return element == Element::kE4m3 ? 32 : 16;
}

// Reads one element of an operand through its descriptor: start address, leading and stride byte offsets, swizzle mode.
class Operand {
  public:
    Operand(Block& block, uint64_t descriptor, bool transposed, Element element)
        : block_(block), transposed_(transposed), element_(element) {
        start_ = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
        leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
        stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
        if (descriptor >> 49 & 7) machine().fail("wgmma: matrix descriptors with a base offset are not supported");
        switch (descriptor >> 62) {
            case 0:
                width_ = 16;
                break;
            case 1:
                width_ = 128;
                break;
            case 2:
                width_ = 64;
                break;
            default:
                width_ = 32;
                break;
        }
    }

    // Element (i, k): i along M or N, k along the depth.
    float at(int i, int k) const {
        uint32_t offset = 0;
        if (!transposed_) {
            // Rows of `width_` bytes along k, eight to a group.
            const uint32_t byte = static_cast<uint32_t>(k) * (element_ == Element::kE4m3 ? 1 : 2);
            offset = static_cast<uint32_t>(i / 8) * stride_ + static_cast<uint32_t>(i % 8) * width_ + byte % width_ +
                     byte / width_ * leading_;
        } else {
            // Rows of `width_` bytes along M or N, eight k to a group; without swizzle the two strides swap.
            const uint32_t byte = static_cast<uint32_t>(i) * 2;
            const uint32_t along_k = width_ == 16 ? leading_ : stride_;
            const uint32_t along_i = width_ == 16 ? stride_ : leading_;
            offset = static_cast<uint32_t>(k / 8) * along_k + static_cast<uint32_t>(k % 8) * width_ + byte % width_ +
                     byte / width_ * along_i;
        }
        uint32_t address = start_ + offset;
        if (width_ > 16) address ^= (address >> 7 & (width_ / 16 - 1)) << 4;
        if (address + (element_ == Element::kE4m3 ? 1 : 2) > block_.shared->bytes()) {
            machine().fail("%s: wgmma reads shared offset 0x%x, past the %zu bytes of the block",
                           block_name(block_).c_str(), address, block_.shared->bytes());
        }
        if (element_ == Element::kE4m3) return to_float(block_.shared->shadow()[address]);
        uint16_t bits;
        memcpy(&bits, block_.shared->shadow() + address, sizeof bits);
        return to_float(bits, element_ == Element::kBf16);
    }

  private:
    Block& block_;
    bool transposed_;
    Element element_;
    uint32_t start_ = 0, leading_ = 0, stride_ = 0, width_ = 16;
};

void execute(Block& block, const WarpGroup::Issued& issued) {
    const Product& product = issued.product;
    const int n = product.columns, depth = depth_of(product.element);
    const bool bf16 = product.element == Element::kBf16;
    std::vector<float> a(kRows * depth), b(static_cast<size_t>(depth * n)), d(static_cast<size_t>(kRows * n));
    if (product.a_in_registers) {
        for (int thread = 0; thread < 128; ++thread) {
            const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
            for (int r = 0; r < 4; ++r) {
                const uint32_t pair = issued.a[static_cast<size_t>(thread * 4 + r)];
                float* to = &a[static_cast<size_t>((row + r % 2 * 8) * depth + column + r / 2 * 8)];
                to[0] = to_float(static_cast<uint16_t>(pair), bf16);
                to[1] = to_float(static_cast<uint16_t>(pair >> 16), bf16);
            }
        }
    } else {
        const Operand operand(block, product.a, product.transpose_a, product.element);
        for (int i = 0; i < kRows; ++i) {
            for (int k = 0; k < depth; ++k) a[static_cast<size_t>(i * depth + k)] = operand.at(i, k);
        }
    }
    const Operand operand(block, product.b, product.transpose_b, product.element);
    for (int k = 0; k < depth; ++k) {
        for (int j = 0; j < n; ++j) b[static_cast<size_t>(k * n + j)] = operand.at(j, k);
    }
    // Accumulator registers 4j .. 4j + 3 of thread t: rows t / 4 % 8 (+ 8) of its warp's 16, columns 8j + 2 (t % 4) (+
    // 1).
    const auto each_register = [&](auto&& visit) {
        for (int thread = 0; thread < 128; ++thread) {
            const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
            for (int r = 0; r < n / 2; ++r) {
                visit(issued.accumulators[static_cast<size_t>(thread)][r],
                      d[static_cast<size_t>((row + r / 2 % 2 * 8) * n + r / 4 * 8 + column + r % 2)]);
            }
        }
    };
    if (product.accumulate) each_register([](float& in_register, float& value) { value = in_register; });
    for (int i = 0; i < kRows; ++i) {
        float* row = &d[static_cast<size_t>(i * n)];
        for (int k = 0; k < depth; ++k) {
            const float factor = a[static_cast<size_t>(i * depth + k)];
            const float* other = &b[static_cast<size_t>(k * n)];
            for (int j = 0; j < n; ++j) row[j] += factor * other[j];
        }
    }
    each_register([](float& in_register, float& value) { in_register = value; });
}

WarpGroup& own_group() {
    Block& block = *current_thread->block;
    const size_t index = current_thread->linear / 128;
    if (block.threads.size() < (index + 1) * 128) machine().fail("wgmma needs a warpgroup of four whole warps");
    if (block.warp_groups.size() <= index) block.warp_groups.resize(index + 1);
    if (!block.warp_groups[index]) {
        block.warp_groups[index] = std::make_unique<WarpGroup>();
        block.warp_groups[index]->block = &block;
    }
    return *block.warp_groups[index];
}

}  // namespace

void WarpGroup::execute_next_group() {
    while (!products.empty() && products.front().group == executed_groups) {
        if (products.front().arrived != 128) {
            machine().fail("%s: only %d of the warpgroup's 128 threads executed a wgmma that all committed",
                           block_name(*block).c_str(), products.front().arrived);
        }
        execute(*block, products.front());
        products.pop_front();
        ++executed_products;
    }
    ++executed_groups;
    commits.pop_front();
}

bool WarpGroup::execute_waited_for() {
    if (executed_groups >= waited_for || commits.empty() || commits.front() != 128) return false;
    execute_next_group();
    return true;
}

void product_issue(const Product& product, float* accumulator, const uint32_t* a) {
    WarpGroup& group = own_group();
    Thread& thread = *current_thread;
    if (!thread.product_fence) {
        machine().fail("wgmma without wgmma_fence since the start of the kernel or the last wgmma_wait");
    }
    const uint64_t position = thread.products_issued++ - group.executed_products;
    if (position == group.products.size()) {
        group.products.emplace_back();
        group.products.back().product = product;
        group.products.back().group = thread.products_committed;
        if (a != nullptr) group.products.back().a.resize(128 * 4);
    }
    auto& issued = group.products[position];
    if (issued.product != product || issued.group != thread.products_committed) {
        machine().fail("wgmma: the threads of the warpgroup disagree on operands, shape or group");
    }
    const size_t index = thread.linear % 128;
    issued.accumulators[index] = accumulator;
    if (a != nullptr) memcpy(&issued.a[index * 4], a, 4 * sizeof(uint32_t));
    ++issued.arrived;
}

void product_fence() {
    current_thread->product_fence = true;
}

void product_commit() {
    WarpGroup& group = own_group();
    const uint64_t position = current_thread->products_committed++ - group.executed_groups;
    if (position == group.commits.size()) group.commits.push_back(0);
    if (++group.commits[position] == 128 && position == 0 && machine().chance(machine().policy().product_at_once)) {
        group.execute_next_group();
    }
}

void product_wait(int pending) {
    WarpGroup& group = own_group();
    Thread& thread = *current_thread;
    thread.product_fence = false;
    if (thread.products_committed <= static_cast<uint64_t>(pending)) return;
    const uint64_t wanted = thread.products_committed - static_cast<uint64_t>(pending);
    if (wanted > group.waited_for) group.waited_for = wanted;
    machine().wait_until("wgmma group", nullptr, 0, [&] { return group.executed_groups >= wanted; });
}

}  // namespace tokenspeed::emulator
