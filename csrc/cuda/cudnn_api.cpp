// SPDX-License-Identifier: Apache-2.0
// Finds cuDNN's functions at their first use.
#include "cuda/cudnn_api.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace fastresnet::cudnn {
namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("cuDNN has no ") + name);
}

Api load() {
  // Found among torch's own libraries, which are loaded by now, wherever they lie.
  void* library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("no cuDNN 9 (libcudnn.so.9) is found");
  Api found{};
  find(library, "cudnnGetVersion", found.get_version);
  if (found.get_version() < kOldestVersion)
    throw std::runtime_error("cuDNN " + std::to_string(found.get_version()) +
                             " is found, and 9.8 or newer is needed");
  find(library, "cudnnGetErrorString", found.get_error_string);
  find(library, "cudnnGetLastErrorString", found.get_last_error_string);
  find(library, "cudnnCreate", found.create);
  find(library, "cudnnSetStream", found.set_stream);
  find(library, "cudnnBackendCreateDescriptor", found.create_descriptor);
  find(library, "cudnnBackendDestroyDescriptor", found.destroy_descriptor);
  find(library, "cudnnBackendFinalize", found.finalize);
  find(library, "cudnnBackendSetAttribute", found.set_attribute);
  find(library, "cudnnBackendGetAttribute", found.get_attribute);
  find(library, "cudnnBackendExecute", found.execute);
  return found;
}

}  // namespace

const Api& api() {
  static const Api loaded = load();  // tried again at the next call where it throws
  return loaded;
}

void check_status(Status status, const char* what) {
  if (status == 0) return;
  char last[512] = "";
  api().get_last_error_string(last, sizeof(last));
  throw std::runtime_error(std::string("cuDNN: ") + what + ": " + api().get_error_string(status) +
                           (last[0] == '\0' ? "" : std::string(" (") + last + ")"));
}

}  // namespace fastresnet::cudnn
