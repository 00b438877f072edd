// SPDX-License-Identifier: Apache-2.0
// The module that `import fastresnet._C_cuda<major>` finds. It holds nothing: the .cu files beside
// it register their kernels as the library loads. FASTRESNET_CUDA_MAJOR comes from setup.py.
#include <Python.h>

#define FASTRESNET_JOIN_EXPANDED(a, b) a##b
#define FASTRESNET_JOIN(a, b) FASTRESNET_JOIN_EXPANDED(a, b)

PyMODINIT_FUNC FASTRESNET_JOIN(PyInit__C_cuda, FASTRESNET_CUDA_MAJOR)() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
