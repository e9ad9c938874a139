// The names and signatures under which PyTorch knows the compiled ops: torch.ops.mrcnn_edu.*
//
// Chapter 9. Each op is declared once here and implemented per device in cpu/ops.cpp and cuda/ops.cpp. What torch.compile
// and autograd need to know (shapes, derivatives) is written in Python, in mrcnn_edu/ops/compiled.py. Only light headers
// are included, in the CUDA part as well: that keeps the build short and asks for no more than nvcc and its runtime.
//
// The library is bound to the PyTorch it was built with. PyTorch's stable ABI would lift that, but only for versions
// newer than the oldest one supported here, and at the price of hand-packed argument lists.
#include <Python.h>
#include <torch/library.h>

// `import mrcnn_edu._C` loads this file; the import system asks for an init function, the ops register themselves.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(mrcnn_edu, m) {
  // layer: 0 RoIPool, 1 RoIWarp, 2 RoIAlign. Returns the pooled features and, for the maximum, which sample won.
  m.def(
      "roi_features(Tensor[] features, Tensor rois, Tensor levels, float[] scales, int layer, int bins_y, int bins_x, "
      "int samples_per_bin, bool aligned, bool maximum) -> (Tensor, Tensor)");
  m.def(
      "roi_features_backward(Tensor gradient, Tensor winners, Tensor rois, Tensor levels, float[] scales, "
      "SymInt images, SymInt[] heights, SymInt[] widths, bool channels_last, int layer, int samples_per_bin, "
      "bool aligned, bool maximum) -> Tensor[]");
  m.def("nms(Tensor boxes, Tensor scores, Tensor? groups, float threshold, int? max_keep) -> Tensor");
  // The same for several images, without waiting for the device, which is why only CUDA has it: from where each image's
  // boxes begin the rows that it keeps, and how many they are. A row with a score of minus infinity is not there.
  m.def(
      "nms_images(Tensor boxes, Tensor scores, Tensor? groups, int[] counts, float threshold, int? max_keep) "
      "-> (Tensor, Tensor)");
  // relu(map + bias + added) in the place of the map, channels last; oneDNN has it for the CPU, so here it is for CUDA.
  m.def("bias_relu_(Tensor(a!) map, Tensor bias, Tensor? added) -> ()");
  // Bool masks, or float32 probabilities without a threshold.
  m.def("paste(Tensor masks, Tensor boxes, int height, int width, float? threshold, bool integer) -> Tensor");
  // The same without the image around them: windows [N, (top, left, bottom, right)] and all their pixels in one row.
  m.def(
      "paste_crops(Tensor masks, Tensor boxes, int height, int width, float? threshold, bool integer) "
      "-> (Tensor, Tensor)");
}
