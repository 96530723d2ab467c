/* The programs of the conformance suite's images that Debian's packages do not have. One file, one static
   program; the name it is called by says which of them it is:

     pause          waits to be told to stop; as PID 1 of a pod it also reaps orphans
     nnp            prints its effective user ID (installed set-uid root)
     pgrep PATTERN  the PIDs whose name contains PATTERN; status 1 if there are none
     ipcs           the System V shared memory segments of its IPC namespace
     health PORT    answers every call with grpc.health.v1's SERVING, which is all that a gRPC probe asks  */

#include <ctype.h>
#include <dirent.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void on_stop(int signal) {
  (void)signal;
  _exit(0);
}

static void on_child(int signal) {
  (void)signal;
  while (waitpid(-1, NULL, WNOHANG) > 0) {
  }
}

static void wait_for_stop(void) {
  struct sigaction action = {0};
  action.sa_handler = on_stop;
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
  action.sa_handler = on_child;
  action.sa_flags = SA_NOCLDSTOP;
  sigaction(SIGCHLD, &action, NULL);
  for (;;) pause();
}

static int pgrep(const char *pattern) {
  DIR *proc = opendir("/proc");
  struct dirent *entry;
  int found = 0;
  if (!proc) return 3;
  while ((entry = readdir(proc))) {
    char path[300], name[64];
    FILE *file;
    if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == getpid()) continue;
    snprintf(path, sizeof path, "/proc/%s/comm", entry->d_name);
    if (!(file = fopen(path, "r"))) continue;
    if (fgets(name, sizeof name, file)) {
      name[strcspn(name, "\n")] = 0;
      if (strstr(name, pattern)) {
        puts(entry->d_name);
        found = 1;
      }
    }
    fclose(file);
  }
  closedir(proc);
  return !found;
}

static int ipcs(void) {
  char line[512];
  FILE *file = fopen("/proc/sysvipc/shm", "r");
  if (!file) return 1;
  printf("------ Shared Memory Segments --------\n%-10s %-10s %-10s %s\n", "key", "shmid", "perms", "bytes");
  if (fgets(line, sizeof line, file)) {
    while (fgets(line, sizeof line, file)) {
      long key, id;
      unsigned long mode, size;
      if (sscanf(line, "%ld %ld %lo %lu", &key, &id, &mode, &size) == 4)
        printf("0x%08lx %-10ld %-10lo %lu\n", key & 0xffffffffL, id, mode & 0777, size);
    }
  }
  fclose(file);
  return 0;
}

static int read_all(int fd, void *buffer, size_t count) {
  for (size_t done = 0; done < count;) {
    ssize_t got = read(fd, (char *)buffer + done, count - done);
    if (got <= 0) return 0;
    done += (size_t)got;
  }
  return 1;
}

/* One HTTP/2 frame (RFC 9113, section 4.1); stream holds the four bytes of the stream's number. */
static void send_frame(int fd, unsigned char type, unsigned char flags, const unsigned char *stream, const void *data,
                       unsigned char size) {
  unsigned char frame[9 + 255] = {0, 0, size, type, flags};
  memcpy(frame + 5, stream, 4);
  memcpy(frame + 9, data, size);
  if (write(fd, frame, 9 + (size_t)size) < 0) _exit(1);
}

/* Reads frames and answers the end of each request; what the request says does not matter. */
static void serve_health(int fd) {
  enum { DATA = 0, HEADERS = 1, SETTINGS = 4, PING = 6, END_STREAM = 1, ACK = 1, END_HEADERS = 4 };
  /* Header blocks (RFC 7541): ":status: 200" and "content-type: application/grpc"; "grpc-status: 0". */
  static const char head[] = "\x88\x5f\x10" "application/grpc", tail[] = "\x00\x0b" "grpc-status" "\x01" "0";
  /* A gRPC message of two bytes: field 1, status, is 1, SERVING. */
  static const unsigned char serving[] = {0, 0, 0, 0, 2, 8, 1}, connection[4] = {0};
  unsigned char header[9], payload[16384];
  if (!read_all(fd, payload, 24)) return; /* the client's preface */
  send_frame(fd, SETTINGS, 0, connection, "", 0);
  while (read_all(fd, header, sizeof header)) {
    size_t size = (size_t)header[0] << 16 | (size_t)header[1] << 8 | header[2];
    if (size > sizeof payload || !read_all(fd, payload, size)) return;
    if (header[3] == SETTINGS && !(header[4] & ACK)) send_frame(fd, SETTINGS, ACK, connection, "", 0);
    if (header[3] == PING && !(header[4] & ACK)) send_frame(fd, PING, ACK, connection, payload, 8);
    if ((header[3] == DATA || header[3] == HEADERS) && (header[4] & END_STREAM)) {
      send_frame(fd, HEADERS, END_HEADERS, header + 5, head, sizeof head - 1);
      send_frame(fd, DATA, 0, header + 5, serving, sizeof serving);
      send_frame(fd, HEADERS, END_HEADERS | END_STREAM, header + 5, tail, sizeof tail - 1);
    }
  }
}

static int health(int port) {
  int listener = socket(AF_INET, SOCK_STREAM, 0), fd;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
  signal(SIGCHLD, SIG_IGN);
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) return 1;
  while ((fd = accept(listener, NULL, NULL)) >= 0) {
    if (fork() == 0) {
      serve_health(fd);
      _exit(0);
    }
    close(fd);
  }
  return 1;
}

int main(int argc, char **argv) {
  const char *slash = strrchr(argv[0], '/');
  const char *name = slash ? slash + 1 : argv[0];
  if (!strcmp(name, "pause")) wait_for_stop();
  if (!strcmp(name, "pgrep")) return argc > 1 ? pgrep(argv[argc - 1]) : 2;
  if (!strcmp(name, "ipcs")) return ipcs();
  if (!strcmp(name, "health")) return argc > 1 ? health(atoi(argv[1])) : 2;
  printf("Effective uid: %d\n", (int)geteuid());
  return 0;
}
