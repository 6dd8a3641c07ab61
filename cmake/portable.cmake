# link_portably(TARGET): lets a library that is built on a recent system load wherever PyTorch's own wheels do, from
# glibc 2.28 and the libstdc++ of GCC 8 on (manylinux_2_28). For x86-64; elsewhere it does nothing.
#
# glibc 2.34 moved libpthread, libdl and librt into libc under new versions of their symbols; the old ones are still
# there for programs that were linked earlier. To be such a program, link stand-ins for those libraries, which hold
# nothing but the names and old versions of a .map file, before the system's.

function(_old_glibc soname)
  set(map "${CMAKE_SOURCE_DIR}/cmake/portable/${soname}.map")
  set(source "${CMAKE_BINARY_DIR}/portable/${soname}.cpp")
  file(READ "${map}" names)
  string(REGEX MATCHALL "[a-z][a-z0-9_]*;" names "${names}")
  string(REGEX REPLACE "([a-z0-9_]+);+" "void \\1() {}\n" functions "${names}")
  file(CONFIGURE OUTPUT "${source}" CONTENT "extern \"C\" {\n${functions}}\n" @ONLY)
  add_library(old_${soname} SHARED "${source}")
  set_target_properties(old_${soname} PROPERTIES
    CXX_VISIBILITY_PRESET default
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/portable"
    NO_SONAME ON)
  target_compile_options(old_${soname} PRIVATE -w -fno-builtin)
  target_link_options(old_${soname} PRIVATE -nostdlib "-Wl,-soname,${soname},--version-script,${map}")
endfunction()

function(link_portably target)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    return()
  endif()
  target_sources(${target} PRIVATE "${CMAKE_SOURCE_DIR}/cmake/portable/libstdcxx.cpp")
  set(libraries "")
  foreach(soname IN LISTS ARGN)
    if(NOT TARGET old_${soname})
      _old_glibc(${soname})
    endif()
    list(APPEND libraries old_${soname})
  endforeach()
  target_link_options(${target} PRIVATE -s "-Wl,--version-script,${CMAKE_SOURCE_DIR}/cmake/portable/exports.map")
  target_link_libraries(${target} PRIVATE -Wl,--push-state,--no-as-needed ${libraries} -Wl,--pop-state)
endfunction()
