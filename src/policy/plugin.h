// Makes a shared library a plug-in, which adds its methods to the built-in ones. One of its files includes this in
// place of policy/policy.h, or all do, and registers methods as the built-in ones are. examples/policy-plugin/ is a
// template.
#pragma once

#include "policy/plugin_interface.h"

extern "C" [[gnu::visibility("default"), gnu::weak]] const kvreplay::PolicyPlugin kvreplay_policy_plugin;
// Weak, so that several files of a plug-in may include this. NOLINTNEXTLINE(misc-definitions-in-headers)
constinit const kvreplay::PolicyPlugin kvreplay_policy_plugin{.methods = kvreplay::MethodRegistration::methods};
