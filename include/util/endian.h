/*
 * Byte order: loads and stores at any alignment.  qcow2, LUKS, NBD are big-endian, QED is little.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef QB_UTIL_ENDIAN_H
#define QB_UTIL_ENDIAN_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define QB_DEFINE_ENDIAN(bits, order)                                                              \
    static inline uint##bits##_t qb_ld##order##bits(const void *p)                                 \
    {                                                                                              \
        uint##bits##_t v;                                                                          \
        memcpy(&v, p, sizeof(v));                                                                  \
        return order##bits##toh(v);                                                                \
    }                                                                                              \
    static inline void qb_st##order##bits(void *p, uint##bits##_t v)                               \
    {                                                                                              \
        v = hto##order##bits(v);                                                                   \
        memcpy(p, &v, sizeof(v));                                                                  \
    }

QB_DEFINE_ENDIAN(16, be)
QB_DEFINE_ENDIAN(32, be)
QB_DEFINE_ENDIAN(64, be)
QB_DEFINE_ENDIAN(16, le)
QB_DEFINE_ENDIAN(32, le)
QB_DEFINE_ENDIAN(64, le)

#undef QB_DEFINE_ENDIAN
#endif
