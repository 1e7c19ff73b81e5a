// Guard of a CUDA device for this package, where torch was built for the CPU alone: one device, of which it changes
// nothing.

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct OneDevice : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneDevice);

}  // namespace c10::impl
