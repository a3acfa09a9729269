/* A slow disk below one folder: every open of a file there takes so many milliseconds.
 *
 *   LD_PRELOAD=slow_open.so SLOW_FOLDER=/srv/adapters SLOW_MS_FILE=/tmp/ms program
 *
 * The milliseconds are read from SLOW_MS_FILE at each open, so that they can change while the program runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void wait_for(const char *path) {
  const char *folder = getenv("SLOW_FOLDER"), *file = getenv("SLOW_MS_FILE");
  if (!folder || !file || strncmp(path, folder, strlen(folder))) return;
  FILE *said = fopen(file, "r");
  long ms = 0;
  if (said) {
    if (fscanf(said, "%ld", &ms) != 1) ms = 0;
    fclose(said);
  }
  struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&pause, NULL);
}

#define OPENS(name)                                                     \
  int name(const char *path, int flags, ...) {                          \
    va_list more;                                                       \
    va_start(more, flags);                                              \
    int mode = va_arg(more, int);                                       \
    va_end(more);                                                       \
    wait_for(path);                                                     \
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
  }
OPENS(open)
OPENS(open64)
