// SPDX-License-Identifier: Apache-2.0
// A stand-in for cuDNN: the functions of its C backend API that csrc/cuda/cudnn_api.cpp looks up,
// with execution on host memory. Whatever leaves open what a graph means is refused; cuDNN 9.24
// lets some of it pass (tensors without an id or a type, operands that are no broadcast of each
// other).
#include <malloc.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "execution.h"

using namespace stand_in;

extern "C" {

// For tests to set.
int stand_in_workspace_bytes = 0;    // of the plans that are made from now on
int stand_in_refused_engines = 0;    // bit n: engine n makes no plan
int stand_in_silent_heuristics = 0;  // bit n: those of mode n have no answer
int stand_in_fails_to_execute = 0;
int stand_in_reads_as_stored = 0;  // and this: see Reading
int stand_in_reads_bits_from_the_highest = 0;

void* stand_in_stream = nullptr;  // that of the last execution

}  // extern "C"

namespace {

struct Context {
  void* stream = nullptr;
};

std::set<const Context*> contexts;
std::map<const void*, std::shared_ptr<Descriptor>> descriptors;
std::string last_error;

Context& context_of(Handle handle) {
  auto* context = static_cast<Context*>(handle);
  check(contexts.contains(context), "what is no handle");
  return *context;
}

const std::shared_ptr<Descriptor>& find(BackendDescriptor raw) {
  const auto found = descriptors.find(raw);
  check(found != descriptors.end(), "what is no descriptor, or no longer");
  return found->second;
}

void set_attribute(Descriptor& d, Attribute name, AttributeType type, int64_t count,
                   const void* values) {
  check(!d.is_finalized, "an attribute of what is finalized");
  const std::vector<Rule>& rules = rules_of(d.type);
  const auto rule =
      std::find_if(rules.begin(), rules.end(), [&](const Rule& r) { return r.attribute == name; });
  check(rule != rules.end(), "a descriptor of type ", d.type, " has no attribute ", name);
  check(type == rule->type, rule->name, " of type ", type, ", not ", rule->type);
  check(rule->count == 0 ? count > 0 : count == rule->count, rule->name, " of ", count, " values");
  check(values != nullptr, rule->name, " at no address");
  if (type == kTypeDescriptor) {
    auto& parts = d.parts[name];
    parts.clear();
    for (int64_t i = 0; i < count; ++i)
      parts.push_back(find(static_cast<const BackendDescriptor*>(values)[i]));
  } else {
    const auto* bytes = static_cast<const char*>(values);
    d.values[name].assign(bytes, bytes + count * size_of(type));
  }
}

void finalize(Descriptor& d) {
  check(!d.is_finalized, "what is finalized already");
  for (const Rule& rule : rules_of(d.type))
    check(d.has(rule.attribute) || is_optional(rule.attribute), "no ", rule.name, " is set");
  for (const auto& [name, parts] : d.parts)
    for (const auto& part : parts)
      check(part->is_finalized, "attribute ", name, " is not finalized");
  switch (d.type) {
    case kTensor:
      tensor_of(d);
      break;
    case kConvolution:
      convolution_of(d);
      break;
    case kConvolutionForward:
    case kConvolutionBackwardData:
    case kPointwiseOperation:
    case kReductionOperation:
      operation_of(d);
      break;
    case kOperationGraph:
      operations_of(d);
      break;
    case kEngineHeuristics:
      check(d.part(kHeuristicsGraph, kOperationGraph).has(kGraphHandle) != d.has(kHeuristicsDevice),
            "a graph for both a handle and a device, or for neither");
      check_support((stand_in_silent_heuristics >> d.one<int>(kHeuristicsModeOf) & 1) == 0,
                    "heuristics without an answer");
      break;
    case kExecutionPlan: {
      const int engine = d.part(kPlanEngineConfig, kEngineConfig).engine;
      check(d.has(kPlanHandle) != d.has(kPlanDevice),
            "a plan for both a handle and a device, or for neither");
      if (d.has(kPlanHandle)) context_of(d.one<Handle>(kPlanHandle));
      check_support((stand_in_refused_engines >> engine & 1) == 0, "engine ", engine,
                    " makes no plan");
      d.workspace_bytes = stand_in_workspace_bytes;
      break;
    }
    case kVariantPack: {
      const auto ids = d.all<int64_t>(kPackUniqueIds);
      check(ids.size() == d.all<void*>(kPackPointers).size(), ids.size(),
            " unique ids for another number of pointers");
      check(std::set(ids.begin(), ids.end()).size() == ids.size(), "two pointers for one id");
      break;
    }
    default:
      break;
  }
  d.is_finalized = true;
}

// How many values there are; they are copied as far as there is room.
int64_t get_attribute(const Descriptor& d, Attribute name, AttributeType type, int64_t room,
                      void* values) {
  check(d.is_finalized, "an attribute of what is not finalized");
  if (name == kHeuristicsResults && type == kTypeDescriptor) {
    const bool by_model = d.one<Heuristics>(kHeuristicsModeOf) == Heuristics::by_model;
    const auto engines = by_model ? std::vector{0, 1} : std::vector{2};
    const auto count = std::min(room, static_cast<int64_t>(engines.size()));
    for (int64_t i = 0; i < count; ++i) {
      Descriptor& config = *find(static_cast<BackendDescriptor*>(values)[i]);
      check(config.type == kEngineConfig, "results that are no engine configs");
      config.parts[kHeuristicsGraph] = d.parts.at(kHeuristicsGraph);
      config.engine = engines[i];
      config.is_finalized = true;
    }
    return count;
  }
  if (name == kPlanWorkspaceSize && type == kTypeInt64) {
    if (room > 0) *static_cast<int64_t*>(values) = d.workspace_bytes;
    return 1;
  }
  if (name == kPlanJson && type == kTypeChar) {
    const int engine = d.part(kPlanEngineConfig, kEngineConfig).engine;
    const std::string json = "{\"engine\": " + std::to_string(engine) + "}";
    const auto size = static_cast<int64_t>(json.size()) + 1;
    if (room > 0) std::memcpy(values, json.c_str(), std::min(room, size));
    return size;
  }
  throw Error{kBadParameter, "an attribute that cannot be asked for"};
}

void check_memory(const std::vector<Operation>& operations,
                  const std::map<int64_t, char*>& addresses) {
  std::map<int64_t, Tensor> tensors;
  std::set<int64_t> produced;
  const auto meet = [&](const Tensor& t) {
    if (!t.is_virtual) tensors.emplace(t.id, t);
  };
  for (const Operation& o : operations) {
    std::for_each(o.inputs.begin(), o.inputs.end(), meet);
    meet(o.output);
    produced.insert(o.output.id);
  }
  for (const auto& [id, address] : addresses)
    check(tensors.contains(id), "an address of tensor ", id, ", which is not in memory");
  for (const auto& [id, t] : tensors) {
    check(addresses.contains(id), "no address of tensor ", id);
    const char* address = addresses.at(id);
    check(address != nullptr && reinterpret_cast<uintptr_t>(address) % t.alignment == 0, "tensor ",
          id, " at an address that is not one of whole ", t.alignment, " bytes");
    for (const auto& [other_id, other] : tensors) {
      if (other_id == id || !produced.contains(other_id)) continue;
      const char* place = addresses.at(other_id);
      check(address + t.bytes() <= place || place + other.bytes() <= address, "tensors ", id,
            " and ", other_id, " share memory");
    }
  }
}

void execute(Handle handle, const Descriptor& plan, const Descriptor& pack) {
  stand_in_stream = context_of(handle).stream;
  check(plan.type == kExecutionPlan && plan.is_finalized, "what is no finalized plan");
  check(pack.type == kVariantPack && pack.is_finalized, "what is no finalized variant pack");
  check(plan.has(kPlanHandle), "a plan for a device that is only described");
  require(stand_in_fails_to_execute == 0, kExecutionFailed, "a kernel that fails");

  const Descriptor& config = plan.part(kPlanEngineConfig, kEngineConfig);
  const auto operations = operations_of(config.part(kHeuristicsGraph, kOperationGraph));
  std::map<int64_t, char*> addresses;
  const auto ids = pack.all<int64_t>(kPackUniqueIds);
  const auto pointers = pack.all<char*>(kPackPointers);
  for (size_t i = 0; i < ids.size(); ++i) addresses.emplace(ids[i], pointers[i]);
  check_memory(operations, addresses);
  if (plan.workspace_bytes > 0) {
    auto* workspace = pack.one<void*>(kPackWorkspace);
    check(malloc_usable_size(workspace) >= static_cast<size_t>(plan.workspace_bytes),
          "a workspace of less than ", plan.workspace_bytes, " bytes");
    std::memset(workspace, 0xff, plan.workspace_bytes);
  }
  run(operations, addresses,
      {stand_in_reads_as_stored != 0, stand_in_reads_bits_from_the_highest != 0});
}

template <class Function>
Status guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const Error& error) {
    last_error = error.words;
    return error.status;
  }
}

}  // namespace

extern "C" {

int stand_in_descriptors() { return static_cast<int>(descriptors.size()); }

size_t cudnnGetVersion() { return kOldestVersion; }

const char* cudnnGetErrorString(Status status) {
  switch (status) {
    case kBadParameter:
      return "CUDNN_STATUS_BAD_PARAM";
    case kNotSupported:
      return "CUDNN_STATUS_NOT_SUPPORTED";
    case kExecutionFailed:
      return "CUDNN_STATUS_EXECUTION_FAILED";
    default:
      return "CUDNN_STATUS_SUCCESS";
  }
}

void cudnnGetLastErrorString(char* message, size_t size) {
  message[last_error.copy(message, size - 1)] = '\0';
  last_error.clear();
}

Status cudnnCreate(Handle* handle) {
  auto* context = new Context;
  contexts.insert(context);
  *handle = context;
  return 0;
}

Status cudnnSetStream(Handle handle, void* stream) {
  return guarded([&] { context_of(handle).stream = stream; });
}

Status cudnnBackendCreateDescriptor(DescriptorType type, BackendDescriptor* raw) {
  return guarded([&] {
    rules_of(type);
    auto made = std::make_shared<Descriptor>();
    made->type = type;
    *raw = made.get();
    descriptors.emplace(made.get(), std::move(made));
  });
}

Status cudnnBackendDestroyDescriptor(BackendDescriptor raw) {
  return guarded([&] {
    find(raw);
    descriptors.erase(raw);
  });
}

Status cudnnBackendFinalize(BackendDescriptor raw) {
  return guarded([&] { finalize(*find(raw)); });
}

Status cudnnBackendSetAttribute(BackendDescriptor raw, Attribute name, AttributeType type,
                                int64_t count, const void* values) {
  return guarded([&] { set_attribute(*find(raw), name, type, count, values); });
}

Status cudnnBackendGetAttribute(BackendDescriptor raw, Attribute name, AttributeType type,
                                int64_t room, int64_t* count, void* values) {
  return guarded([&] { *count = get_attribute(*find(raw), name, type, room, values); });
}

Status cudnnBackendExecute(Handle handle, BackendDescriptor plan, BackendDescriptor pack) {
  return guarded([&] { execute(handle, *find(plan), *find(pack)); });
}

}  // extern "C"
