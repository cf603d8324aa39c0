// The model's side of the double, and a C interface to both for ctypes.
#include "tensorrt_llm/batch_manager/kvCacheManager.h"

namespace tensorrt_llm::batch_manager {

void TrtGptModelInflightBatching::storeContextBlocks(std::shared_ptr<LlmRequest> const& llmReq) {
    mKvCacheManager->getSequence(llmReq->mRequestId);  // throws for a request that has no sequence
}

}  // namespace tensorrt_llm::batch_manager

using namespace tensorrt_llm::batch_manager;

namespace {

constexpr SizeType32 kWindow = 1 << 20;
std::shared_ptr<KVCacheManager> manager;
std::shared_ptr<TrtGptModelInflightBatching> model;
std::unordered_map<int, std::shared_ptr<LlmRequest>> requests;

}  // namespace

extern "C" {

void start(int blocks, int tokens_per_block) {
    manager = std::make_shared<KVCacheManager>(blocks, tokens_per_block);
    model = std::make_shared<TrtGptModelInflightBatching>(manager);
    requests.clear();
}

void request(int number, int prompt, int new_tokens, int beams) {
    auto made = std::make_shared<LlmRequest>();
    made->mRequestId = number, made->mPromptLen = prompt, made->mMaxNewTokens = new_tokens;
    made->mSamplingConfig.beamWidth = beams;
    requests[number] = made;
}

int free_blocks() { return manager->getNumFreeBlocks(); }
int tokens(int number) { return manager->getSequence(number).getNumTokens(); }
int needed(int number) { return manager->getRemainingBlocksToCompletion(*requests.at(number), kWindow); }
int next_steps(int number, bool two) { return manager->getNeededBlocksOneStep(*requests.at(number), two, kWindow); }
void add(int number) { manager->addSequence(number, requests.at(number)->mPromptLen); }
void remove_sequence(int number) { manager->removeSequence(number); }

void prefilled(int number) {
    model->storeContextBlocks(requests.at(number));
    requests.at(number)->isPrefilled = true;
}

// 0, or 1 where no block is free.
int add_token(int number) {
    try {
        manager->addToken(number);
    } catch (std::runtime_error const&) {
        return 1;
    }
    return 0;
}
}
