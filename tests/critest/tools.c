/* The programs of the conformance suite's images that Debian's packages do not have. One file, one static
   program; the name it is called by says which of them it is:

     pause          waits to be told to stop; as PID 1 of a pod it also reaps orphans
     nnp            prints its effective user ID (installed set-uid root)
     pgrep PATTERN  the PIDs whose name contains PATTERN; status 1 if there are none
     ipcs           the System V shared memory segments of its IPC namespace  */

#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static int wait_for_stop(void) {
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

int main(int argc, char **argv) {
  const char *slash = strrchr(argv[0], '/');
  const char *name = slash ? slash + 1 : argv[0];
  if (!strcmp(name, "pause")) return wait_for_stop();
  if (!strcmp(name, "pgrep")) return argc > 1 ? pgrep(argv[argc - 1]) : 2;
  if (!strcmp(name, "ipcs")) return ipcs();
  printf("Effective uid: %d\n", (int)geteuid());
  return 0;
}
