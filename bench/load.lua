-- Create the requests of wrk; the environment has PROFILE and TARGET. Print the result as JSON.

local profile = os.getenv("PROFILE")
local target = os.getenv("TARGET")
local users = 5000
local items = 20
local keys = 2000
local first_user = tonumber(os.getenv("FIRST_USER"))
local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init()
  math.randomseed(os.time() * 1000 + number * 7919 + tonumber(os.getenv("SEED")))
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  if target == "rpc" then
    wrk.headers["apikey"] = os.getenv("KEY")
  elseif os.getenv("TOKEN") ~= "" then
    wrk.headers["Authorization"] = "Bearer " .. os.getenv("TOKEN")
  end
end

local function uuid()
  return string.format(
    "%08x-%04x-4%03x-8%03x-%06x%06x",
    math.random(0, 4294967295), math.random(0, 65535), math.random(0, 4095),
    math.random(0, 4095), math.random(0, 16777215), math.random(0, 16777215)
  )
end

function request()
  local user = profile == "one hot user" and first_user or first_user + math.random(0, users - 1)
  local item = profile == "one hot item" and 0 or math.random(0, items - 1)
  if profile == "replays" then
    local key = math.random(0, keys - 1)
    user = first_user + key % users
    item = key % items
    wrk.headers["Idempotency-Key"] = "replayed-" .. key
  end
  local item_id = string.format("00000000-0000-4000-8000-%012d", item)
  if target == "rpc" then
    return wrk.format(nil, "/rest/v1/rpc/debit_use", nil, string.format(
      '{"user_id_input":%d,"item_input":"%s","idempotency_key_input":"%s",' ..
      '"expected_price_input":null}', user, item_id, uuid()))
  end
  return wrk.format(nil, "/payments/debit", nil,
    string.format('{"user_id":%d,"item_id":"%s"}', user, item_id))
end

function done(summary, latency)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read +
    summary.errors.write + summary.errors.timeout
  io.write(string.format(
    'RESULT {"completed": %d, "failed": %d, "seconds": %.4f, ' ..
    '"p50": %.3f, "p95": %.3f, "p99": %.3f}\n',
    summary.requests - failed, failed, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
