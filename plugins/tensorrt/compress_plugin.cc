// ChunkKVCompress: after a layer's attention, move the kept tokens of its paged caches to the first slots, in place.
//   in   context [T,Hq*D] float32, float16, bfloat16 or fp8: attention's output, so that this node runs after it;
//        leader: qkv [T,(Hq+2*Hkv)*D] float32, float16 or bfloat16, rotated; ranker: chunk_scores [T] float32;
//        follower: kept_indices [T] int32; kept_lengths, row_starts, context_lengths [B] int32;
//        host_request_types, host_context_lengths [B] int32, host; kv_cache_block_offsets [P,B,2,M] int32;
//        host_kv_cache_pool_pointers [P,2] int64, host; host_kv_cache_pool_mapping [A] or [A,2] int32, host;
//        leader and ranker with delimiter boundaries: is_delimiter [T] int32
//   out  context, copied, or with order_only: done [1] int32, which later nodes wait for and nobody writes or reads;
//        leader and ranker: kept_indices [T] int32, N entries of a row from row_starts on, undefined
//        where no row of the batch is compressed
#include <cinttypes>

#include "chunkkv/layout.h"
#include "packed_plugin.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum {
    kRole = kSharedFields,
    kLayers,
    kLayerInPool,
    kNumHeads,
    kNumKvHeads,
    kHeadSize,
    kTokensPerBlock,
    kKvBytes,
    kMappingRank,
    kOrderOnly
};
enum Role { kLeader, kRanker, kFollower };
constexpr const char* kRoleWords[] = {"leader", "ranker", "follower"};
constexpr int32_t kMaxLayers = 256, kMaxLayerNumber = 65535;

constexpr auto kFields = withShared({
    {"role", 0, 2, kRequired, kRoleWords},
    {"layers", 0, kMaxLayerNumber, kRequired, nullptr, kMaxLayers},
    {"layer_in_pool", 0, kMaxLayerNumber, 0, nullptr, kMaxLayers},
    kNumHeadsField,
    kNumKvHeadsField,
    kHeadSizeField,
    kTokensPerBlockField,
    {"kv_bytes", 1, 4},
    {"mapping_rank", 1, 2},
    {"order_only", 0, 1, 0},
});
constexpr Table kTable{"ChunkKVCompress", kFields.data(), static_cast<int32_t>(kFields.size())};

enum {
    kContextIn,
    kSource,  // qkv, chunk_scores or kept_indices
    kKeptLengths,
    kRowStarts,
    kContextLengths,
    kHostTypes,
    kHostContext,
    kBlocks,
    kHostPools,
    kHostMapping,
    kIsDelimiter
};
enum { kContextOut, kKeptIndices };
constexpr const char* kInputs[] = {"context",
                                   "",
                                   "kept_lengths",
                                   "row_starts",
                                   "context_lengths",
                                   "host_request_types",
                                   "host_context_lengths",
                                   "kv_cache_block_offsets",
                                   "host_kv_cache_pool_pointers",
                                   "host_kv_cache_pool_mapping",
                                   "is_delimiter"};
constexpr const char* kSources[] = {"qkv", "chunk_scores", "kept_indices"};  // by role

class Compress final : public PackedPlugin {
  public:
    Compress() noexcept : PackedPlugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    /// Where the cache of a layer begins, and the index of its pool.
    struct Cache {
        int32_t pool;
        const char* base;
    };

    Plugin* copy() const override { return new Compress(*this); }
    /// Whether later nodes wait for this one by a tensor that holds nothing, so that a generation step enqueues nothing.
    bool ordersOnly() const noexcept { return value(kOrderOnly) != 0; }
    bool selects() const noexcept { return value(kRole) != kFollower; }
    int32_t inputs() const noexcept override { return selects() && isDelimited() ? kIsDelimiter + 1 : kIsDelimiter; }
    int32_t outputs() const noexcept override { return selects() ? kKeptIndices + 1 : kKeptIndices; }
    Heads heads() const noexcept { return {value(kNumHeads), value(kNumKvHeads), value(kHeadSize)}; }
    int64_t blockBytes() const { return int64_t{value(kTokensPerBlock)} * value(kNumKvHeads) * tokenBytes(); }
    int64_t tokenBytes() const { return int64_t{value(kHeadSize)} * value(kKvBytes); }

    int32_t rank(int32_t input) const noexcept override {
        if (input == kHostMapping) return value(kMappingRank);
        if (input == kSource) return value(kRole) == kLeader ? 2 : 1;
        return input == kBlocks ? 4 : input == kContextIn || input == kHostPools ? 2 : 1;
    }

    bool checkFields() const override {
        const size_t layers = array(kLayers).size(), places = array(kLayerInPool).size();
        if (!areSettings() || !isPowerOfTwo(kTokensPerBlock, "tokens_per_block") || !isPowerOfTwo(kKvBytes, "kv_bytes"))
            return false;
        if (places != layers && (places > 0 || value(kMappingRank) == 1))
            return report("%s: layers has %zu entries, layer_in_pool has %zu; give one for each layer", getPluginName(),
                          layers, places);
        size_t bytes;  // the data type is not known yet: float16, which has kernels, serves to check the rest
        return value(kRole) != kLeader || scoreBytes(heads(), DataType::kHALF, 0, 0, bytes);
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        if (index == kContextIn) return isFloating(types[index]) || types[index] == DataType::kFP8;
        if (index == kSource && value(kRole) == kLeader) return isFloating(types[index]);
        if (index == kSource && value(kRole) == kRanker) return types[index] == DataType::kFLOAT;
        return types[index] == (index == kHostPools ? DataType::kINT64 : DataType::kINT32);
    }

    DataType outputType(int32_t index, const DataType* input_types) const override {
        return index == kContextOut && !ordersOnly() ? input_types[kContextIn] : DataType::kINT32;
    }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const override {
        out[kContextOut] = in[kContextIn];
        if (ordersOnly()) {
            out[kContextOut].nbDims = 1;
            out[kContextOut].d[0] = builder.constant(1);
        }
        if (!selects()) return true;
        out[kKeptIndices].nbDims = 1;
        out[kKeptIndices].d[0] = in[kContextIn].d[0];
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override {
        out[kContextOut] = ordersOnly() ? Dims{1, {1}} : in[kContextIn].dims;
        if (selects()) out[kKeptIndices] = Dims{1, {in[kContextIn].dims.d[0]}};
    }

    bool check(const PluginTensorDesc* in) const override {
        if (!hasShape(kInputs[kContextIn], in[kContextIn], {-1, heads().queryWidth()}) ||
            !hasShape(kInputs[kKeptLengths], in[kKeptLengths], {-1}))
            return false;
        const int64_t tokens = in[kContextIn].dims.d[0], rows = in[kKeptLengths].dims.d[0];
        const char* source = kSources[value(kRole)];
        if (value(kRole) == kLeader ? !hasShape(source, in[kSource], {tokens, heads().width()})
                                    : !hasShape(source, in[kSource], {tokens}))
            return false;
        for (const int32_t i : {kRowStarts, kContextLengths, kHostTypes, kHostContext})
            if (!hasShape(kInputs[i], in[i], {rows})) return false;
        if (!hasShape(kInputs[kBlocks], in[kBlocks], {-1, rows, 2, -1}) ||
            !hasShape(kInputs[kHostPools], in[kHostPools], {in[kBlocks].dims.d[0], 2}))
            return false;
        if (inputs() > kIsDelimiter && !hasShape(kInputs[kIsDelimiter], in[kIsDelimiter], {tokens})) return false;
        return isMapping(in[kHostMapping]);
    }

    bool isMapping(const PluginTensorDesc& mapping) const {
        const char* name = kInputs[kHostMapping];
        if (value(kMappingRank) == 2 ? !hasShape(name, mapping, {-1, 2}) : !hasShape(name, mapping, {-1})) return false;
        for (const int32_t layer : array(kLayers))
            if (layer >= mapping.dims.d[0])
                return report("%s: layers holds %d, but %s has %" PRId64 " layers; use numbers of this pipeline stage",
                              getPluginName(), layer, name, mapping.dims.d[0]);
        return true;
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc* in) const override {
        if (!selects()) return 0;
        const int64_t rows = largest(in, {kKeptLengths, kRowStarts, kContextLengths, kHostTypes, kHostContext}, 0);
        const int64_t tokens = largest(in, {kContextIn, kSource}, 0);
        size_t bytes = 0;
        if (value(kRole) == kLeader && !scoreBytes(heads(), in[kSource].desc.type, rows, tokens, bytes)) return 0;
        return parts(nullptr, rows, tokens, bytes).bytes;
    }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc*, const Buffers& buffers) const override {
        const int64_t tokens = in[kContextIn].dims.d[0];
        Batch batch;
        if (!readBatch(buffers.inputs[kHostTypes], buffers.inputs[kHostContext], in[kKeptLengths].dims.d[0], tokens,
                       batch))
            return false;
        const size_t bytes = ordersOnly() ? 0 : tokens * heads().queryWidth() * elementBytes(in[kContextIn].type);
        if (!ordersOnly() &&
            !done(chunkkv_copy(buffers.outputs[kContextOut], buffers.inputs[kContextIn], bytes, buffers.stream)))
            return false;
        if (!batch.compresses) return true;
        const Rows rows = contextRows(batch, buffers.inputs[kContextLengths], buffers.inputs[kRowStarts]);
        if (!selects()) return compact(in, rows, batch, static_cast<const int32_t*>(buffers.inputs[kSource]), buffers);
        auto* kept_indices = static_cast<int32_t*>(buffers.outputs[kKeptIndices]);
        return select(in, rows, batch, kept_indices, buffers) && compact(in, rows, batch, kept_indices, buffers);
    }

    bool select(const PluginTensorDesc* in, const Rows& rows, const Batch& batch, int32_t* kept_indices,
                const Buffers& buffers) const {
        if (!buffers.workspace) return fail("the workspace is NULL");
        const Parts at = parts(buffers.workspace, batch.rows, batch.tokens, 0);
        if (isDelimited() && !findChunks(rows, buffers.inputs[kIsDelimiter], at, buffers.stream)) return false;
        const void* source = buffers.inputs[kSource];
        const bool leads = value(kRole) == kLeader;
        if (leads && !scoreChunks(heads(), in[kSource].type, source, rows, at, at.chunk_scores, buffers.stream))
            return false;
        SelectParams params{};
        params.settings = settings();
        params.rows = rows;
        params.chunk_scores = leads ? at.chunk_scores : static_cast<const float*>(source);
        if (isDelimited()) {
            params.chunk_starts = at.chunk_starts;
            params.num_chunks = at.num_chunks;
        }
        params.kept_indices = kept_indices;
        params.kept_lengths = at.kept_lengths;  // select writes N again; the input of that name is read-only
        params.choices = 1;
        params.max_chunks = maxChunks(params.settings, rows.max_length);
        params.max_kept = batch.longest;
        return done(chunkkv_select(&params, buffers.stream));
    }

    /// Move tokens of all layers, one launch per pool that they lie in.
    bool compact(const PluginTensorDesc* in, const Rows& rows, const Batch& batch, const int32_t* kept_indices,
                 const Buffers& buffers) const {
        const int64_t pools = in[kBlocks].dims.d[0], table = in[kBlocks].dims.d[3];
        const int32_t count = static_cast<int32_t>(array(kLayers).size());
        Cache caches[kMaxLayers];
        for (int32_t i = 0; i < count; ++i)
            if (!findCache(i, pools, buffers, caches[i]) || !isNew(caches, i)) return false;
        CompactParams params{};
        params.rows = rows;
        params.layout.stride_token = tokenBytes();
        params.layout.stride_head = value(kTokensPerBlock) * tokenBytes();
        params.layout.stride_block = blockBytes();
        params.layout.extent = INT64_MAX;  // nothing here knows the size of the pool
        params.layout.tokens_per_block = value(kTokensPerBlock);
        params.layout.max_blocks = static_cast<int32_t>(table);
        params.kept_indices = kept_indices;
        params.kept_lengths = static_cast<const int32_t*>(buffers.inputs[kKeptLengths]);
        params.max_kept = batch.longest;
        params.kv_heads = value(kNumKvHeads);
        params.choices = 1;
        params.row_bytes = static_cast<int32_t>(tokenBytes());
        for (int64_t pool = 0; pool < pools; ++pool) {
            Layer layers[kMaxLayers];
            params.num_layers = 0;
            for (int32_t i = 0; i < count; ++i)
                if (caches[i].pool == pool)
                    layers[params.num_layers++] = {caches[i].base, caches[i].base, nullptr, nullptr};
            if (params.num_layers == 0) continue;
            params.layers = layers;
            params.layout.block_offsets =
                static_cast<const int32_t*>(buffers.inputs[kBlocks]) + pool * batch.rows * 2 * table;
            if (!done(chunkkv_compact(&params, buffers.stream))) return false;
        }
        return true;
    }

    /// One launch moves all caches in place, so two of them may not be the same memory.
    bool isNew(const Cache* caches, int32_t number) const {
        for (int32_t i = 0; i < number; ++i)
            if (caches[i].base == caches[number].base)
                return report("%s: layers %d and %d have the same place in pool %d; give each its own in layer_in_pool",
                              getPluginName(), array(kLayers)[i], array(kLayers)[number], caches[number].pool);
        return true;
    }

    bool findCache(int32_t number, int64_t pools, const Buffers& buffers, Cache& cache) const {
        const auto* pointers = static_cast<const int64_t*>(buffers.inputs[kHostPools]);
        const auto* mapping = static_cast<const int32_t*>(buffers.inputs[kHostMapping]);
        if (!pointers || !mapping) return fail("host_kv_cache_pool_pointers or host_kv_cache_pool_mapping is NULL");
        const int32_t layer = array(kLayers)[number], width = value(kMappingRank);
        cache.pool = mapping[int64_t{layer} * width];
        const int32_t place = width == 2 ? mapping[int64_t{layer} * width + 1] : array(kLayerInPool)[number];
        if (cache.pool < 0 || cache.pool >= pools || place < 0 || place > kMaxLayerNumber)
            return report("%s: host_kv_cache_pool_mapping puts layer %d at place %d of pool %d; there are %" PRId64
                          " pools",
                          getPluginName(), layer, place, cache.pool, pools);
        const auto* pool = reinterpret_cast<const char*>(static_cast<uintptr_t>(pointers[int64_t{cache.pool} * 2]));
        if (!pool) return report("%s: the address of pool %d is 0", getPluginName(), cache.pool);
        cache.base = poolLayer(pool, place, blockBytes());
        return true;
    }
};

}  // namespace

IPluginCreatorInterface* compressCreator() {
    static Creator<Compress> creator;
    return &creator;
}

}  // namespace chunkkv::trt
