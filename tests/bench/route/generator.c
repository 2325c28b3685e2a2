// Load generator: HTTP/1.1 over kept-alive connections to a server on this machine, one thread, epoll.
//
//   cc -O2 -o generator generator.c
//   generator -u 127.0.0.1:8080/route -b bodies.jsonl -c 16 -n 256
//
//   -u HOST:PORT/PATH  where to; the host is an address of the loopback network
//   -b FILE            one request body per line, sent by POST in turn; without it, GET
//   -c N               connections, each with one request at a time (closed loop); default 1
//   -n N               requests in all; default without end
//   -t SECONDS         limit of the whole run; default 120
//   -i SECONDS         pause from one request's due time to the next one's, on a single connection (open loop)
//   -x N -y SECONDS    every N-th request is given up so long after it was sent: its connection is closed
//   -p PID,PID...      processes whose CPU time is told
//
// SIGTERM and SIGINT end a run early. One line of JSON on standard output tells what happened. The latency of
// a request counts from when it was due to the last byte of its answer; those given up or broken have none.
// It asks for real-time priority, since a client on another machine would not wait for the server's CPU.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 16384, MAX_CONNECTIONS = 1024, MAX_PIDS = 256, MAX_EVENTS = 256 };
static const int64_t NS = 1000000000, NEVER = INT64_MAX;

typedef struct {
  char *bytes;
  size_t length;
} message;

typedef enum { IDLE, READING_HEAD, READING_BODY } phase;

typedef struct {
  int fd;
  phase phase;
  char head[HEAD_BYTES + 1];
  size_t head_length;
  long long body_left;
  int status;
  int64_t due_ns, give_up_ns;
} connection;

static struct {
  struct sockaddr_in address;
  char host[64], path[1024];
  message *requests;
  size_t n_requests;
  int n_connections;
  long total;
  int64_t limit_ns, interval_ns, give_up_after_ns;
  long give_up_every;
  pid_t pids[MAX_PIDS];
  int n_pids;
} plan = {.n_connections = 1, .total = -1, .limit_ns = 120 * 1000000000LL};

static struct {
  long sent, given_up, broken, by_class[6];
  double *latencies_ms;
  size_t n_latencies, room;
} tally;

static volatile sig_atomic_t stopping;
static int poll_fd, timer_fd;
static int64_t next_due_ns;

static void fail(const char *what) {
  fprintf(stderr, "generator: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
  exit(1);
}

static int64_t clock_ns(clockid_t clock) {
  struct timespec time;
  if (clock_gettime(clock, &time)) return -1;
  return time.tv_sec * NS + time.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static int64_t cpu_ns(pid_t pid) {
  clockid_t clock;
  int64_t used_ns = clock_getcpuclockid(pid, &clock) ? -1 : clock_ns(clock);
  return used_ns < 0 ? 0 : used_ns; // a process that has ended
}

static int64_t all_cpu_ns(void) {
  int64_t sum_ns = 0;
  for (int i = 0; i < plan.n_pids; i++) sum_ns += cpu_ns(plan.pids[i]);
  return sum_ns;
}

static void on_signal(int number) {
  (void)number;
  stopping = 1;
}

// ---- connections

static void open_connection(connection *c) {
  int yes = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (c->fd < 0 || setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes)) fail("socket");
  if (connect(c->fd, (struct sockaddr *)&plan.address, sizeof plan.address)) fail("connect");
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl");
  c->phase = IDLE;
}

static void reopen(connection *c) {
  close(c->fd); // leaves the epoll set by itself
  open_connection(c);
}

static bool may_send(void) { return !stopping && (plan.total < 0 || tally.sent < plan.total); }

static bool write_all(int fd, const message *text) {
  for (size_t done = 0; done < text->length;) {
    ssize_t n = write(fd, text->bytes + done, text->length - done);
    if (n <= 0) return false;
    done += n;
  }
  return true;
}

// The next request of this connection, if one is left and, in the open loop, due.
static void send_next(connection *c) {
  while (may_send()) {
    int64_t now = now_ns();
    if (plan.interval_ns) {
      if (next_due_ns > now) return;
      c->due_ns = next_due_ns;
      next_due_ns += plan.interval_ns;
    } else {
      c->due_ns = now;
    }
    const message *request = &plan.requests[tally.sent % plan.n_requests];
    tally.sent++;
    bool gives_up = plan.give_up_every && tally.sent % plan.give_up_every == 0;
    c->give_up_ns = gives_up ? now + plan.give_up_after_ns : NEVER;
    c->head_length = 0;
    c->phase = READING_HEAD;
    if (write_all(c->fd, request)) return;
    tally.broken++;
    reopen(c);
  }
}

static void note_latency(int64_t latency_ns) {
  if (tally.n_latencies == tally.room) {
    tally.room = tally.room ? 2 * tally.room : 4096;
    tally.latencies_ms = realloc(tally.latencies_ms, tally.room * sizeof(double));
    if (!tally.latencies_ms) fail("memory");
  }
  tally.latencies_ms[tally.n_latencies++] = latency_ns / 1e6;
}

static void finish(connection *c) {
  int class = c->status / 100;
  tally.by_class[class >= 1 && class <= 5 ? class : 0]++;
  note_latency(now_ns() - c->due_ns);
  c->phase = IDLE;
  send_next(c);
}

static void break_off(connection *c) {
  if (c->phase != IDLE) tally.broken++;
  reopen(c);
  send_next(c);
}

// Status and body length, once the head is complete; false if it is not one that this program reads.
static bool read_head(connection *c, const char *end) {
  c->body_left = -1;
  c->status = atoi(c->head + strlen("HTTP/1.1 "));
  for (const char *line = strstr(c->head, "\r\n"); line && line < end; line = strstr(line, "\r\n")) {
    line += 2;
    if (!strncasecmp(line, "content-length:", 15)) c->body_left = atoll(line + 15);
  }
  if (c->body_left < 0) return false;
  c->body_left -= c->head + c->head_length - (end + 4);
  return true;
}

static void on_readable(connection *c) {
  static char body[1 << 16];
  bool in_head = c->phase == READING_HEAD;
  ssize_t n = in_head ? read(c->fd, c->head + c->head_length, HEAD_BYTES - c->head_length)
                      : read(c->fd, body, sizeof body);
  if (n <= 0 || c->phase == IDLE) { // the server closed it, or spoke unasked
    break_off(c);
    return;
  }
  if (in_head) {
    c->head_length += n;
    c->head[c->head_length] = 0;
    const char *end = strstr(c->head, "\r\n\r\n");
    if (!end && c->head_length < HEAD_BYTES) return;
    if (!end || !read_head(c, end)) {
      errno = 0;
      fail("an answer without content-length, or with a head that is too long");
    }
    c->phase = READING_BODY;
  } else {
    c->body_left -= n;
  }
  if (c->body_left <= 0) finish(c);
}

// ---- the run

static void wake_at(int64_t at_ns) {
  struct itimerspec spec = {.it_value = {.tv_sec = at_ns / NS, .tv_nsec = at_ns % NS}};
  if (timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &spec, NULL)) fail("timerfd_settime");
}

// Gives up what is to be given up and sends what is due; returns the time of the next such act.
static int64_t act(connection *connections, int64_t end_ns) {
  int64_t next_ns = end_ns;
  for (int i = 0; i < plan.n_connections; i++) {
    connection *c = &connections[i];
    if (c->phase != IDLE && c->give_up_ns <= now_ns()) {
      tally.given_up++;
      reopen(c);
      send_next(c);
    }
    if (c->phase == IDLE && plan.interval_ns) send_next(c);
    if (c->phase != IDLE && c->give_up_ns < next_ns) next_ns = c->give_up_ns;
    if (c->phase == IDLE && may_send() && plan.interval_ns && next_due_ns < next_ns) next_ns = next_due_ns;
  }
  return next_ns;
}

static bool busy(const connection *connections) {
  for (int i = 0; i < plan.n_connections; i++)
    if (connections[i].phase != IDLE) return true;
  return may_send();
}

// Returns whether every request was sent and settled within the limit.
static bool run(connection *connections, int64_t start_ns) {
  int64_t end_ns = start_ns + plan.limit_ns;
  next_due_ns = start_ns;
  for (int i = 0; i < plan.n_connections; i++) send_next(&connections[i]);
  while (busy(connections)) {
    wake_at(act(connections, end_ns));
    if (now_ns() >= end_ns) return false;
    struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(poll_fd, events, MAX_EVENTS, -1);
    for (int i = 0; i < n; i++) {
      uint64_t expirations;
      if (events[i].data.ptr) on_readable(events[i].data.ptr);
      else if (read(timer_fd, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timer");
    }
  }
  return true;
}

// ---- arguments and report

static void read_target(char *text) {
  char *slash = strchr(text, '/');
  snprintf(plan.path, sizeof plan.path, "%s", slash ? slash : "/");
  if (slash) *slash = 0;
  snprintf(plan.host, sizeof plan.host, "%s", text);
  char *colon = strchr(text, ':');
  if (colon) *colon = 0;
  plan.address.sin_family = AF_INET;
  plan.address.sin_port = htons(colon ? atoi(colon + 1) : 80);
  errno = 0;
  if (strncmp(text, "127.", 4) || inet_pton(AF_INET, text, &plan.address.sin_addr) != 1)
    fail("the target must be an address of the loopback network, 127.x.x.x");
}

static void add_request(const char *body, size_t length) {
  static size_t room;
  if (plan.n_requests == room) {
    room = room ? 2 * room : 256;
    plan.requests = realloc(plan.requests, room * sizeof(message));
    if (!plan.requests) fail("memory");
  }
  char *bytes = malloc(length + sizeof plan.path + sizeof plan.host + 256);
  if (!bytes) fail("memory");
  int head = body ? sprintf(bytes, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
                                   "Content-Length: %zu\r\n\r\n", plan.path, plan.host, length)
                  : sprintf(bytes, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", plan.path, plan.host);
  if (body) memcpy(bytes + head, body, length);
  plan.requests[plan.n_requests++] = (message){bytes, head + length};
}

static void read_bodies(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) fail(path);
  char *line = NULL;
  size_t room = 0;
  for (ssize_t n; (n = getline(&line, &room, file)) > 0;) {
    if (line[n - 1] == '\n') n--;
    add_request(line, n);
  }
  free(line);
  fclose(file);
  errno = 0;
  if (!plan.n_requests) fail("the file of bodies is empty");
}

static void read_pids(char *text) {
  for (char *word = strtok(text, ","); word && plan.n_pids < MAX_PIDS; word = strtok(NULL, ","))
    plan.pids[plan.n_pids++] = atoi(word);
}

static void read_arguments(int argc, char **argv) {
  const char *bodies = NULL;
  for (int option; (option = getopt(argc, argv, "u:b:c:n:t:i:x:y:p:")) > 0;) switch (option) {
    case 'u': read_target(optarg); break;
    case 'b': bodies = optarg; break;
    case 'c': plan.n_connections = atoi(optarg); break;
    case 'n': plan.total = atol(optarg); break;
    case 't': plan.limit_ns = atof(optarg) * 1e9; break;
    case 'i': plan.interval_ns = atof(optarg) * 1e9; break;
    case 'x': plan.give_up_every = atol(optarg); break;
    case 'y': plan.give_up_after_ns = atof(optarg) * 1e9; break;
    case 'p': read_pids(optarg); break;
    default: exit(2);
    }
  errno = 0;
  if (!plan.address.sin_port) fail("-u HOST:PORT/PATH is needed");
  if (plan.n_connections < 1 || plan.n_connections > MAX_CONNECTIONS) fail("-c must be from 1 to 1024");
  if (plan.interval_ns && plan.n_connections > 1) fail("-i goes with one connection");
  if (bodies) read_bodies(bodies);
  else add_request(NULL, 0);
}

static int by_size(const void *left, const void *right) {
  double a = *(const double *)left, b = *(const double *)right;
  return (a > b) - (a < b);
}

// Nearest rank: the least latency that this share of the requests does not exceed.
static double quantile(double share) {
  if (!tally.n_latencies) return 0;
  size_t rank = (size_t)(share * tally.n_latencies + 0.999999);
  return tally.latencies_ms[rank ? rank - 1 : 0];
}

static void report(int64_t elapsed_ns, int64_t server_cpu_ns, bool complete, bool realtime) {
  size_t n = tally.n_latencies;
  double sum_ms = 0;
  for (size_t i = 0; i < n; i++) sum_ms += tally.latencies_ms[i];
  qsort(tally.latencies_ms, n, sizeof(double), by_size);
  long settled = n + tally.given_up + tally.broken;
  printf("{\"sent\": %ld, \"answered\": %zu, \"given_up\": %ld, \"broken\": %ld, ", tally.sent, n, tally.given_up,
         tally.broken);
  printf("\"status_2xx\": %ld, \"status_4xx\": %ld, \"status_5xx\": %ld, ", tally.by_class[2], tally.by_class[4],
         tally.by_class[5]);
  printf("\"seconds\": %.6f, \"rps\": %.4f, ", elapsed_ns / 1e9, settled * 1e9 / elapsed_ns);
  printf("\"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f, \"mean_ms\": %.4f, ", quantile(0.5),
         quantile(0.9), quantile(0.99), quantile(1.0), n ? sum_ms / n : 0);
  printf("\"cpu_ms\": %.5f, \"generator_cpu_ms\": %.5f, ", settled ? server_cpu_ns / 1e6 / settled : 0,
         settled ? clock_ns(CLOCK_PROCESS_CPUTIME_ID) / 1e6 / settled : 0);
  printf("\"complete\": %s, \"realtime\": %s}\n", complete ? "true" : "false", realtime ? "true" : "false");
}

int main(int argc, char **argv) {
  read_arguments(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  struct sigaction action = {.sa_handler = on_signal}; // no SA_RESTART: epoll_wait returns
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  bool realtime = !sched_setscheduler(0, SCHED_RR, &(struct sched_param){.sched_priority = 1});
  poll_fd = epoll_create1(0);
  timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  struct epoll_event timer = {.events = EPOLLIN, .data.ptr = NULL};
  if (poll_fd < 0 || timer_fd < 0 || epoll_ctl(poll_fd, EPOLL_CTL_ADD, timer_fd, &timer)) fail("epoll");
  connection *connections = calloc(plan.n_connections, sizeof(connection));
  if (!connections) fail("memory");
  for (int i = 0; i < plan.n_connections; i++) open_connection(&connections[i]);
  int64_t cpu_before_ns = all_cpu_ns(), start_ns = now_ns();
  bool complete = run(connections, start_ns);
  report(now_ns() - start_ns, all_cpu_ns() - cpu_before_ns, complete, realtime);
  return 0;
}
