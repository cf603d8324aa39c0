// A double of the parts of TensorRT-LLM's batch manager that the patch names: own code, with the names of the original.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace tensorrt_llm::batch_manager {

using SizeType32 = std::int32_t;

struct SamplingConfig {
    SizeType32 beamWidth = 1;
};

struct LlmRequest {
    std::uint64_t mRequestId = 0;
    SizeType32 mPromptLen = 0;
    SizeType32 mMaxNewTokens = 0;
    SamplingConfig mSamplingConfig;
    bool isPrefilled = false;

    bool isContextInitState() const { return !isPrefilled; }
    bool isGenerationInProgressState() const { return isPrefilled; }
};

class GenerationRequest {
  public:
    SizeType32 tokens = 0;
    std::vector<std::vector<SizeType32>> blocks{{}};  // [beams][blocks]

    SizeType32 getNumTokens() const { return tokens; }
    std::vector<std::vector<SizeType32>> const& getCacheBlockIds(SizeType32) const { return blocks; }
};

class KVCacheManager {
  public:
    KVCacheManager(SizeType32 blocks, SizeType32 tokensPerBlock);

    SizeType32 getNeededBlocksOneStep(LlmRequest const& req, bool twoStepsLookAhead, SizeType32 windowSize) const;
    SizeType32 getRemainingBlocksToCompletion(LlmRequest const& req, SizeType32 windowSize) const;
    void addSequence(std::uint64_t requestId, SizeType32 inputLength);
    void addToken(std::uint64_t requestId);
    void rewindKVCache(std::uint64_t requestId, SizeType32 rewindLengths);
    void removeSequence(std::uint64_t requestId);

    GenerationRequest const& getSequence(std::uint64_t requestId) const { return mSequences.at(requestId); }
    SizeType32 getTokensPerBlock() const { return mTokensPerBlock; }
    SizeType32 getNumFreeBlocks() const { return static_cast<SizeType32>(mFree.size()); }
    bool isCrossKv() const { return false; }

  private:
    SizeType32 mTokensPerBlock;
    std::vector<SizeType32> mFree;
    std::unordered_map<std::uint64_t, GenerationRequest> mSequences;
};

class TrtGptModelInflightBatching {
  public:
    explicit TrtGptModelInflightBatching(std::shared_ptr<KVCacheManager> manager) : mKvCacheManager(manager) {}
    void storeContextBlocks(std::shared_ptr<LlmRequest> const& llmReq);

  private:
    std::shared_ptr<KVCacheManager> mKvCacheManager;
};

}  // namespace tensorrt_llm::batch_manager
