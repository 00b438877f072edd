// SPDX-License-Identifier: Apache-2.0
// How a convolution is shared out between threads, in one of two ways.
//
// By blocks: each thread stages blocks of pixels of its own in its second-level cache, and reads
// the whole weight for each. By channels: all threads stage the pixels together, then each takes
// some channels of the result, so that every weight is read, and every gradient of a weight
// written, once. That is the better way where there are more weights than pixels, and for planes of
// places, which are whole images, with fewer weights already. Where there are fewer blocks of
// channels than threads, they share out the pixels too.
#pragma once

#include <memory>
#include <vector>

#include "cpu/conv_params.h"
#include "cpu/conv_weight.h"

namespace fastresnet::cpu {

struct Sharing {
  bool by_channels;
  ConvPlan plan;
};
// What was found for a convolution is kept for the next step. normalised: a batch norm and ReLU
// come before it. packed: its weight is packed once for many calls.
std::shared_ptr<const Sharing> share_forward(const ConvShape& s, DType dtype, bool normalised,
                                             bool packed);
std::shared_ptr<const Sharing> share_backward(const ConvShape& s, DType dtype, bool normalised,
                                              bool wants_dx);

// Moments of y, group by group of its rows.
class OutputMoments {
 public:
  OutputMoments(int64_t groups, int64_t channels);

  ConvMoments of(int64_t group);
  void count(int64_t group, int64_t outputs) { counts_[group] += static_cast<double>(outputs); }

  // Mean and biased variance of each channel.
  void merge(float* mean, float* var) const;

 private:
  int64_t channels_;
  std::vector<float> shift_;
  std::vector<double> sums_, counts_;
};

// Computes y.
OutputMoments forward(const ConvForwardParams& p, const Sharing& sharing,
                      const WeightPacking& weight);

// Computes dx, if wanted, and fills dweight. Returns the sums of dx and of dx * (x - x_mean),
// [groups, 2, channels], still to be added up.
std::vector<double> backward(const ConvBackwardParams& p, const Sharing& sharing,
                             const WeightPacking& weight, WeightGradient& dweight);

}  // namespace fastresnet::cpu
