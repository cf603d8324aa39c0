// Shape expressions as TensorRT's builder hands them to getOutputShapes: constants, free dimensions, operations.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

namespace host {

using namespace nvinfer1;

/// Sizes of all inputs, by input and axis.
using Sizes = std::vector<Dims>;

/// A constant, a free dimension of an input, or an operation on two others.
class Expression : public IDimensionExpr, public apiv::VDimensionExpr {
  public:
    enum Kind { kConstant, kFree, kOperation };
    Expression(Kind kind, int64_t a, int64_t b) : kind_(kind), a_(a), b_(b) { mImpl = this; }
    Expression(DimensionOperation op, const Expression& first, const Expression& second)
        : kind_(kOperation), op_(op), first_(&first), second_(&second) {
        mImpl = this;
    }

    bool isConstant() const override { return kind_ == kConstant; }
    int64_t getConstantValue() const override { return a_; }
    bool isSizeTensor() const override { return false; }

    int64_t at(const Sizes& sizes) const {
        if (kind_ == kConstant) return a_;
        if (kind_ == kFree) return sizes.at(a_).d[b_];
        const int64_t x = first_->at(sizes), y = second_->at(sizes);
        switch (op_) {
            case DimensionOperation::kSUM:
                return x + y;
            case DimensionOperation::kPROD:
                return x * y;
            case DimensionOperation::kMAX:
                return std::max(x, y);
            case DimensionOperation::kMIN:
                return std::min(x, y);
            case DimensionOperation::kSUB:
                return x - y;
            case DimensionOperation::kFLOOR_DIV:
                return x / y;
            case DimensionOperation::kCEIL_DIV:
                return (x + y - 1) / y;
            default:
                throw std::runtime_error("operation without a value");
        }
    }

  private:
    Kind kind_;
    int64_t a_ = 0, b_ = 0;  // the constant; or input and axis
    DimensionOperation op_ = DimensionOperation::kSUM;
    const Expression *first_ = nullptr, *second_ = nullptr;
};

/// Owns every expression of one build.
class Expressions : public IExprBuilder, public apiv::VExprBuilder {
  public:
    Expressions() { IExprBuilder::mImpl = this; }

    const Expression* free(int64_t input, int64_t axis) { return keep(Expression::kFree, input, axis); }
    const IDimensionExpr* constant(int64_t value) override { return keep(Expression::kConstant, value, 0); }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                    const IDimensionExpr& second) override {
        if (op < DimensionOperation::kSUM || op > DimensionOperation::kCEIL_DIV) return nullptr;
        const auto &a = static_cast<const Expression&>(first), &b = static_cast<const Expression&>(second);
        kept_.push_back(std::make_unique<Expression>(op, a, b));
        if (a.isConstant() && b.isConstant()) return constant(kept_.back()->at({}));
        return kept_.back().get();
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;  // no plugin of this project may need one
    }

  private:
    const Expression* keep(Expression::Kind kind, int64_t a, int64_t b) {
        kept_.push_back(std::make_unique<Expression>(kind, a, b));
        return kept_.back().get();
    }

    std::vector<std::unique_ptr<Expression>> kept_;
};

}  // namespace host
