// SPDX-License-Identifier: Apache-2.0
// Every schema of the library, and the module that `import fastresnet._C` finds. The kernels
// register themselves under their device's key: csrc/cpu/*.cpp here, csrc/cuda/*.cu in a second
// library. What each operator computes is written in fastresnet/ops/reference.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// PyMODINIT_FUNC exports it; a plain extern "C" would stay hidden under -fvisibility=hidden.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(fastresnet, m) {
  m.def("isa() -> str");
  m.def("isa_levels() -> str[]");
  m.def("release_memory() -> int");
  m.def("empty_images(int batch, int channels, int height, int width, ScalarType dtype) -> Tensor");

  m.def("bn_stats(Tensor x) -> (Tensor mean, Tensor var)");

  m.def(
      "bn(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, bool training)"
      " -> Tensor");
  m.def(
      "bn_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, float eps, "
      "bool training) -> (Tensor dx, Tensor dweight, Tensor dbias)");

  m.def(
      "bn_relu(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, "
      "bool training) -> Tensor");
  m.def(
      "bn_relu_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, "
      "Tensor bias, float eps, bool training) -> (Tensor dx, Tensor dweight, Tensor dbias)");

  m.def(
      "bn_add_relu(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
      "Tensor residual, float eps, bool training) -> (Tensor out, Tensor mask)");
  m.def(
      "bn_add_relu_backward(Tensor grad, Tensor mask, Tensor x, Tensor mean, Tensor var, "
      "Tensor weight, float eps, bool training) -> (Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dresidual)");

  m.def(
      "bn_add_bn_relu(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
      "Tensor residual, Tensor residual_mean, Tensor residual_var, Tensor residual_weight, "
      "Tensor residual_bias, float eps, float residual_eps, bool training) "
      "-> (Tensor out, Tensor mask)");
  m.def(
      "bn_add_bn_relu_backward(Tensor grad, Tensor mask, Tensor x, Tensor mean, Tensor var, "
      "Tensor weight, Tensor residual, Tensor residual_mean, Tensor residual_var, "
      "Tensor residual_weight, float eps, float residual_eps, bool training) -> (Tensor dx, "
      "Tensor dweight, Tensor dbias, Tensor dresidual, Tensor dresidual_weight)");

  // The forward's output was used twice, and the gradients of both uses come apart.
  m.def(
      "bn_add_relu_fork_backward(Tensor grad, Tensor shortcut_grad, Tensor mask, Tensor x, "
      "Tensor mean, Tensor var, Tensor weight, float eps, bool training) -> (Tensor dx, "
      "Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "bn_add_bn_relu_fork_backward(Tensor grad, Tensor shortcut_grad, Tensor mask, Tensor x, "
      "Tensor mean, Tensor var, Tensor weight, Tensor residual, Tensor residual_mean, "
      "Tensor residual_var, Tensor residual_weight, float eps, float residual_eps, "
      "bool training) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, "
      "Tensor dresidual_weight)");

  // index: uint8, laid out like out in channels_last: where in its window each value was found.
  m.def(
      "bn_relu_max_pool(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
      "int kernel_size, int stride, int padding, float eps, bool training) "
      "-> (Tensor out, Tensor index)");
  m.def(
      "bn_relu_max_pool_backward(Tensor grad, Tensor index, Tensor x, Tensor mean, Tensor var, "
      "Tensor weight, int kernel_size, int stride, int padding, float eps, bool training) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  // Averages over whole images, [N, C, 1, 1].
  m.def("global_avg_pool(Tensor x) -> Tensor");
  m.def("global_avg_pool_backward(Tensor grad, int height, int width) -> Tensor");

  // x_mean, x_var, x_weight, x_bias: the convolution's input is relu(bn(x)) rather than x.
  m.def(
      "conv_stats(Tensor x, Tensor? x_mean, Tensor? x_var, Tensor? x_weight, Tensor? x_bias, "
      "float x_eps, Tensor weight, int stride, int padding, int dilation, int groups) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "conv_bn_backward(Tensor grad, Tensor? grad_mask, Tensor sums, Tensor y, Tensor mean, "
      "Tensor var, Tensor bn_weight, float eps, bool training, Tensor x, Tensor? x_mean, "
      "Tensor? x_var, Tensor? x_weight, Tensor? x_bias, float x_eps, Tensor weight, "
      "Tensor? addend, Tensor? addend_mask, int stride, int padding, int dilation, int groups, "
      "bool wants_dx) "
      "-> (Tensor dx, Tensor dweight, Tensor dbn_weight, Tensor dbn_bias, Tensor x_sums)");
  // How conv_stats, conv_relu (of weights packed before) or conv_bn_backward compute: outputs a
  // side together (1: by the sum over taps), whether planes hold place after place, whether pixels
  // are patches, and whether they are read where they lie.
  m.def(
      "conv_method(Tensor x, Tensor weight, int stride, int padding, int dilation, int groups, "
      "*, bool normalised=False, bool packed=False, bool backward=False, bool wants_dx=False) "
      "-> (int tile, bool by_places, bool patches, bool in_place)");
  // act(convolution of x + bias + residual), and the weight as that reads it with inputs of x's
  // size and the present number of threads: float32 [values]. A weight that is not packed, of
  // weight_size, is packed for the time of the call.
  m.def(
      "conv_relu(Tensor x, Tensor weight, int[] weight_size, Tensor? bias, Tensor? residual, "
      "bool relu, int stride, int padding, int dilation, int groups) -> Tensor");
  // Several of them as one. steps: for each what it reads, x (0) or the output of a step (from 1
  // on), what it adds (-1: nothing), whether there is a ReLU, then weight_size, stride, padding,
  // dilation and groups.
  m.def("conv_relu_sequence(Tensor x, Tensor[] packed, Tensor?[] bias, int[] steps) -> Tensor");
  m.def(
      "conv_pack(Tensor x, Tensor weight, int stride, int padding, int dilation, int groups) "
      "-> Tensor");
  m.def(
      "bn_sums(Tensor grad, Tensor? mask, Tensor x, Tensor mean, Tensor? residual, "
      "Tensor? residual_mean) -> (Tensor sums, Tensor residual_sums)");

  // The same sums from a convolution's own kernel, [2, C] (bn_add_relu: [3, C] with a residual):
  // of y and y * y, or of dz and dz * (x - mean), where dz is the gradient behind a batch norm.
  m.def(
      "conv_sums(Tensor x, Tensor weight, int stride, int padding, int dilation, int groups) "
      "-> (Tensor y, Tensor sums)");
  m.def(
      "conv_dgrad_add(Tensor grad, Tensor weight, Tensor addend, int stride, int padding, "
      "int dilation, int groups) -> Tensor");
  m.def(
      "bn_relu_conv_dgrad(Tensor grad, Tensor weight, Tensor x, Tensor mean, Tensor scale, "
      "Tensor bias, int stride, int padding, int dilation, int groups) "
      "-> (Tensor dz, Tensor sums)");
  m.def(
      "bn_add_relu_conv_dgrad(Tensor grad, Tensor weight, Tensor addend, Tensor mask, Tensor x, "
      "Tensor mean, Tensor? residual, Tensor? residual_mean, int stride, int padding, "
      "int dilation, int groups) -> (Tensor dz, Tensor sums)");

  // What follows those sums. scale is weight / sqrt(var + eps).
  m.def("bn_stats_of_sums(Tensor x, Tensor sums) -> (Tensor mean, Tensor var)");
  m.def("bn_scale(Tensor var, Tensor weight, float eps) -> Tensor");
  m.def(
      "bn_backward_of_sums(Tensor dz, Tensor sums, Tensor x, Tensor mean, Tensor var, "
      "Tensor weight, float eps, bool training) -> (Tensor dx, Tensor dweight)");
  m.def(
      "bn_add_bn_backward_of_sums(Tensor dz, Tensor sums, Tensor x, Tensor mean, Tensor var, "
      "Tensor weight, Tensor residual, Tensor residual_mean, Tensor residual_var, "
      "Tensor residual_weight, float eps, float residual_eps, bool training) "
      "-> (Tensor dx, Tensor dweight, Tensor dresidual, Tensor dresidual_weight)");

  // cuDNN's plan for a graph on a device that it is described, in JSON, or an error. For tests.
  m.def(
      "conv_engine(str graph, int[] x_size, int[] weight_size, int stride, int padding, "
      "int dilation, int groups, ScalarType dtype, str device) -> str");
  m.def("cudnn_version() -> int");

  m.def(
      "warp(Tensor images, Tensor index, Tensor boxes, Tensor resized, Tensor turns, Tensor scale, "
      "Tensor shift, Tensor? colours, Tensor(a!) out) -> ()");
}
