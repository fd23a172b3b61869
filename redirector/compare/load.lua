-- Servers and load for the comparison: one lean tool for TCP and Unix sockets alike.
-- A load role warms up, says "measuring", measures, and prints one line of key=value pairs.
--
--   luajit - serve-echo  ADDRESS                 sends back whatever it receives
--   luajit - serve-http  ADDRESS                 200 to every request, keep-alive, many connections
--   luajit - serve-sink  ADDRESS                 discards a stream; at its end sends one byte
--   luajit - echo    ADDRESS WARMUP SECONDS SIZE         one message of SIZE there and back
--   luajit - http    ADDRESS WARMUP SECONDS CONNECTIONS  one request at a time on each
--   luajit - connect ADDRESS WARMUP SECONDS 1            a new connection for every request
--   luajit - bulk    ADDRESS WARMUP SECONDS SIZE         writes of SIZE, as fast as they go
--
-- ADDRESS is 10.0.0.1:80 or /path/of/a/socket. Times in seconds, sizes in bytes.
local ffi = require "ffi"
ffi.cdef [[
typedef struct { long sec, nsec; } timespec_t;
typedef struct { unsigned short family, port; unsigned addr; char zero[8]; } sockaddr_in_t;
typedef struct { unsigned short family; char path[108]; } sockaddr_un_t;
typedef struct __attribute__((packed)) { unsigned events; unsigned long data; } epoll_event_t;
int socket(int, int, int);
int bind(int, const void *, unsigned);
int listen(int, int);
int accept(int, void *, void *);
int connect(int, const void *, unsigned);
int setsockopt(int, int, int, const void *, unsigned);
int shutdown(int, int);
int close(int);
int unlink(const char *);
long send(int, const void *, size_t, int);
long recv(int, void *, size_t, int);
int inet_pton(int, const char *, void *);
unsigned short htons(unsigned short);
int clock_gettime(int, timespec_t *);
int epoll_create1(int);
int epoll_ctl(int, int, int, epoll_event_t *);
int epoll_wait(int, epoll_event_t *, int, int);
char *strerror(int);
]]
local C = ffi.C
local AF_UNIX, AF_INET, SOCK_STREAM, NOSIGNAL = 1, 2, 1, 0x4000
local EPOLLIN, EPOLL_ADD, BUFFER = 1, 1, 1024 * 1024

local role, address = arg[1], arg[2]
local warmup, seconds, number = tonumber(arg[3]), tonumber(arg[4]), tonumber(arg[5])
local is_unix = address:sub(1, 1) == "/"
local buffer = ffi.new("char[?]", BUFFER)
local one = ffi.new("int[1]", 1)
local clock = ffi.new("timespec_t[1]")
io.stdout:setvbuf "no"

local function fail(what)
    io.stderr:write(what, " ", address, ": ", ffi.string(C.strerror(ffi.errno())), "\n")
    os.exit(1)
end

local function now()
    C.clock_gettime(1, clock) -- CLOCK_MONOTONIC
    return tonumber(clock[0].sec) + tonumber(clock[0].nsec) * 1e-9
end

local target, target_size
if is_unix then
    target, target_size = ffi.new "sockaddr_un_t", ffi.sizeof "sockaddr_un_t"
    target.family = AF_UNIX
    ffi.copy(target.path, address)
else
    local host, port = address:match "^(.*):(%d+)$"
    target, target_size = ffi.new "sockaddr_in_t", ffi.sizeof "sockaddr_in_t"
    target.family, target.port = AF_INET, C.htons(tonumber(port))
    local parsed = ffi.new "unsigned[1]"
    if C.inet_pton(AF_INET, host, parsed) ~= 1 then fail "parse" end
    target.addr = parsed[0]
end

local function bytes(text)
    local data = ffi.new("char[?]", #text + 1) -- ffi.copy adds a NUL
    ffi.copy(data, text)
    return data, #text
end

local function nodelay(fd)
    if not is_unix then C.setsockopt(fd, 6, 1, one, 4) end -- IPPROTO_TCP, TCP_NODELAY
end

local function open()
    local fd = C.socket(is_unix and AF_UNIX or AF_INET, SOCK_STREAM, 0)
    if fd < 0 then fail "socket" end
    return fd
end

local function dial()
    local fd = open()
    if C.connect(fd, target, target_size) ~= 0 then fail "connect" end
    return fd
end

local function put(fd, data, size)
    local sent = 0
    while sent < size do
        local n = tonumber(C.send(fd, data + sent, size - sent, NOSIGNAL))
        if n < 0 then return false end
        sent = sent + n
    end
    return true
end

local function get(fd, size)
    local got = 0
    while got < size do
        local n = tonumber(C.recv(fd, buffer + got, size - got, 0))
        if n == 0 then ffi.errno(104) end -- closed too early: ECONNRESET
        if n <= 0 then return false end
        got = got + n
    end
    return true
end

local function serve()
    local fd = open()
    if is_unix then C.unlink(address) else C.setsockopt(fd, 1, 2, one, 4) end -- SO_REUSEADDR
    if C.bind(fd, target, target_size) ~= 0 then fail "bind" end
    if C.listen(fd, 1024) ~= 0 then fail "listen" end
    return fd
end

local function answer()
    return bytes "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello\n"
end

local servers = {}

servers["serve-echo"] = function()
    local listener = serve()
    while true do
        local fd = C.accept(listener, nil, nil)
        if fd < 0 then fail "accept" end
        nodelay(fd)
        while true do
            local n = tonumber(C.recv(fd, buffer, BUFFER, 0))
            if n <= 0 or not put(fd, buffer, n) then break end
        end
        C.close(fd)
    end
end

servers["serve-sink"] = function()
    local listener = serve()
    while true do
        local fd = C.accept(listener, nil, nil)
        if fd < 0 then fail "accept" end
        while tonumber(C.recv(fd, buffer, BUFFER, 0)) > 0 do end
        put(fd, buffer, 1)
        C.close(fd)
    end
end

servers["serve-http"] = function()
    local listener, poll = serve(), C.epoll_create1(0)
    local events, event = ffi.new "epoll_event_t[64]", ffi.new "epoll_event_t"
    local text, size = answer()
    local function watch(fd)
        event.events, event.data = EPOLLIN, fd
        if C.epoll_ctl(poll, EPOLL_ADD, fd, event) ~= 0 then fail "epoll_ctl" end
    end
    watch(listener)
    while true do
        for i = 0, C.epoll_wait(poll, events, 64, -1) - 1 do
            local fd = tonumber(events[i].data)
            if fd == listener then
                local accepted = C.accept(listener, nil, nil)
                if accepted < 0 then fail "accept" end
                nodelay(accepted)
                watch(accepted)
            else
                -- A request comes in one piece: it is small, and nobody pipelines here.
                local n = tonumber(C.recv(fd, buffer, BUFFER, 0))
                if n <= 0 or not put(fd, text, size) then C.close(fd) end
            end
        end
    end
end

-- Latencies in a histogram of 20 ns: exact enough, and no memory is touched but the bins in use.
local BIN, BINS = 20e-9, 5000000
local bins = ffi.new("unsigned[?]", BINS)
local slowest, count = 0, 0

local function record(elapsed)
    local bin = math.floor(elapsed / BIN)
    if bin < 0 then bin = 0 elseif bin >= BINS then bin = BINS - 1 end
    bins[bin] = bins[bin] + 1
    if bin > slowest then slowest = bin end
    count = count + 1
end

local function forget()
    ffi.fill(bins, (slowest + 1) * 4)
    slowest, count = 0, 0
end

local function percentile(share)
    local wanted, seen = share * count, 0
    for bin = 0, slowest do
        seen = seen + bins[bin]
        if seen >= wanted then return (bin + 0.5) * BIN * 1e6 end
    end
end

local function report(elapsed)
    io.write(string.format("operations=%d elapsed_s=%.9f", count, elapsed))
    if slowest > 0 then
        io.write(string.format(" p50_us=%.3f p90_us=%.3f p99_us=%.3f p999_us=%.3f",
            percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999)))
    end
    io.write "\n"
end

-- Runs `step` until the time is over, `step(t)` returning the time at its end.
local function during(time, step)
    local start = now()
    local t, stop = start, start + time
    while t < stop do t = step(t) end
    return t - start
end

local function measure(step)
    during(warmup, step)
    forget()
    io.write "measuring\n"
    report(during(seconds, step))
end

local function request(close)
    local connection = close and "connection: close\r\n" or ""
    return bytes("GET / HTTP/1.1\r\nhost: app\r\n" .. connection .. "\r\n")
end

-- The size of the whole answer; every later one must be of that size.
local function answer_size(fd)
    local n = tonumber(C.recv(fd, buffer, BUFFER, 0))
    if n <= 0 then fail "recv" end
    local text = ffi.string(buffer, n)
    local head, body = text:match "^HTTP/1.1 200 OK\r\n(.-\r\n)\r\n(.*)$"
    local length = head and tonumber(head:lower():match "content%-length: (%d+)\r\n")
    if not length or #body ~= length then
        io.stderr:write("not a whole 200 from ", address, ": ", text:match "^[^\r\n]*", "\n")
        os.exit(1)
    end
    return n
end

local loads = {}

function loads.echo()
    local fd = dial()
    nodelay(fd)
    measure(function(t)
        if not put(fd, buffer, number) or not get(fd, number) then fail "echo" end
        local done = now()
        record(done - t)
        return done
    end)
end

function loads.http()
    local text, size = request(false)
    local poll = C.epoll_create1(0)
    local events, event = ffi.new("epoll_event_t[?]", number), ffi.new "epoll_event_t"
    local started, expected = {}, 0
    for _ = 1, number do
        local fd = dial()
        nodelay(fd)
        event.events, event.data = EPOLLIN, fd
        if C.epoll_ctl(poll, EPOLL_ADD, fd, event) ~= 0 then fail "epoll_ctl" end
        if not put(fd, text, size) then fail "send" end
        expected = answer_size(fd)
        started[fd] = now()
        if not put(fd, text, size) then fail "send" end
    end
    measure(function(t)
        local ready = C.epoll_wait(poll, events, number, 5000)
        if ready == 0 then ffi.errno(110) end -- ETIMEDOUT
        if ready <= 0 then fail "no answer" end
        for i = 0, ready - 1 do
            local fd = tonumber(events[i].data)
            if not get(fd, expected) or buffer[9] ~= 50 then fail "no 200" end -- '2'
            t = now()
            record(t - started[fd])
            started[fd] = t
            if not put(fd, text, size) then fail "send" end
        end
        return t
    end)
end

function loads.connect()
    local text, size = request(true)
    local expected
    measure(function(t)
        local fd = dial()
        nodelay(fd)
        if not put(fd, text, size) then fail "send" end
        if not expected then
            expected = answer_size(fd)
        elseif not get(fd, expected) or buffer[9] ~= 50 then
            fail "no 200"
        end
        -- Not waiting for the end of file: Envoy leaves the closing to the client for a second.
        C.close(fd)
        local done = now()
        record(done - t)
        return done
    end)
end

function loads.bulk()
    local fd = dial()
    local sent = 0
    local function step()
        if not put(fd, buffer, number) then fail "send" end
        sent = sent + 1
        return now()
    end
    during(warmup, step)
    sent = 0
    io.write "measuring\n"
    local start = now()
    during(seconds, step)
    -- Written is not arrived: the clock stops when the far end has read the last byte.
    C.shutdown(fd, 1)
    if not get(fd, 1) then fail "acknowledge" end
    count = sent
    report(now() - start)
end

local run = servers[role] or loads[role]
if not run then
    io.stderr:write("no such role: ", role, "\n")
    os.exit(1)
end
run()
