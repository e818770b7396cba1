-- Arguments: GET or POST, connections, and the number of the service's process.
-- The last line that it prints is JSON.

local user = '{"email": "%d-%d@example.com", "full_name": "Ada Lovelace"}'
local headers = { ["Content-Type"] = "application/json" }
local figures = '{"requests a second": %f, "CPU of a request, µs": %f, '
  .. '"failures": %d, "memory, MB": %f}'

local function read_file(path)
  local file = io.open(path)
  local text = file:read("*a")
  file:close()
  return text
end

-- Microseconds of CPU: the kernel's 14th and 15th field, in hundredths of a second.
local function read_cpu(process)
  local fields = {}
  for field in read_file("/proc/" .. process .. "/stat"):gmatch("%S+") do
    table.insert(fields, field)
  end
  return (fields[14] + fields[15]) * 1e4
end

function setup(thread)
  loader = thread
end

function init(arguments)
  method, connections, process = unpack(arguments)
  started, count, cpu = os.time(), 0, read_cpu(process)
end

function request()
  if method == "GET" then
    return wrk.format("GET", "/users/" .. math.random(1, 1000))
  end
  count = count + 1
  return wrk.format("POST", "/users", headers, user:format(started, count))
end

function done(summary)
  local process = loader:get("process")
  local used = read_cpu(process) - loader:get("cpu")
  local memory = read_file("/proc/" .. process .. "/status"):match("VmRSS:%s+(%d+)")
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write
  -- wrk does not count a connection that never got an answer.
  local unanswered = math.max(loader:get("connections") - summary.requests, 0)
  print("\n" .. figures:format(
    summary.requests / (summary.duration / 1e6),
    used / math.max(summary.requests, 1),
    broken + errors.status + errors.timeout + unanswered,
    memory / 1e3
  ))
end
