// Everything the library offers.
#pragma once

#include "sonicmoe/activation.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/context.hpp"
#include "sonicmoe/device.hpp"
#include "sonicmoe/dtype.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/exchange.hpp"
#include "sonicmoe/memory.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/moe_layer.hpp"
#include "sonicmoe/numerics.hpp"
#include "sonicmoe/router.hpp"
#include "sonicmoe/tensor.hpp"
#include "sonicmoe/version.hpp"
