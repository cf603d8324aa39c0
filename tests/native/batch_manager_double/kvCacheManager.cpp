#include "tensorrt_llm/batch_manager/kvCacheManager.h"

namespace tensorrt_llm::batch_manager {

static SizeType32 blocksFor(SizeType32 tokens, SizeType32 size) { return (tokens + size - 1) / size; }

KVCacheManager::KVCacheManager(SizeType32 blocks, SizeType32 tokensPerBlock) : mTokensPerBlock(tokensPerBlock) {
    for (SizeType32 block = 0; block < blocks; ++block) mFree.push_back(block);
}

SizeType32 KVCacheManager::getNeededBlocksOneStep(
    LlmRequest const& req, bool twoStepsLookAhead, SizeType32 windowSize) const {
    if (windowSize < req.mPromptLen + req.mMaxNewTokens) throw std::invalid_argument("windows are not modelled");
    if (!req.isPrefilled) return blocksFor(req.mPromptLen, mTokensPerBlock);
    SizeType32 const tokens = getSequence(req.mRequestId).tokens;
    SizeType32 const steps = twoStepsLookAhead ? 2 : 1;
    return blocksFor(tokens + steps, mTokensPerBlock) - blocksFor(tokens, mTokensPerBlock);
}

SizeType32 KVCacheManager::getRemainingBlocksToCompletion(LlmRequest const& req, SizeType32 windowSize) const {
    if (windowSize < req.mPromptLen + req.mMaxNewTokens) throw std::invalid_argument("windows are not modelled");
    auto const found = mSequences.find(req.mRequestId);
    SizeType32 const own = found == mSequences.end() ? 0 : static_cast<SizeType32>(found->second.blocks[0].size());
    return blocksFor(req.mPromptLen + req.mMaxNewTokens, mTokensPerBlock) - own;
}

void KVCacheManager::addSequence(std::uint64_t requestId, SizeType32 inputLength) {
    mSequences[requestId] = {};
    for (SizeType32 token = 0; token < inputLength; ++token) addToken(requestId);
}

void KVCacheManager::addToken(std::uint64_t requestId) {
    GenerationRequest& sequence = mSequences.at(requestId);
    if (sequence.tokens++ % mTokensPerBlock != 0) return;
    if (mFree.empty()) throw std::runtime_error("no free block");
    sequence.blocks[0].push_back(mFree.back());
    mFree.pop_back();
}

void KVCacheManager::rewindKVCache(std::uint64_t requestId, SizeType32 rewindLengths) {
    GenerationRequest& sequence = mSequences.at(requestId);
    for (; rewindLengths > 0; --rewindLengths) {
        if (--sequence.tokens % mTokensPerBlock != 0) continue;
        mFree.push_back(sequence.blocks[0].back());
        sequence.blocks[0].pop_back();
    }
}

void KVCacheManager::removeSequence(std::uint64_t requestId) {
    for (SizeType32 block : mSequences.at(requestId).blocks[0]) mFree.push_back(block);
    mSequences.erase(requestId);
}

}  // namespace tensorrt_llm::batch_manager
